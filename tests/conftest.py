import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Many tests, and the processes that they start, compile the same small programs. Worker processes inherit the folder.
CACHE = "JAX_COMPILATION_CACHE_DIR"
if own := CACHE not in os.environ:
    os.environ[CACHE] = tempfile.mkdtemp(prefix="embed-tests-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"


def pytest_unconfigure():
    if own:
        shutil.rmtree(os.environ[CACHE], ignore_errors=True)
