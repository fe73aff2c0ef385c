"""Late or early chunking in training, and the weights of the contextual losses, by the number of chunks of a document.

    embed ablate --config=configs/ablations/chunking.py --workdir=runs/chunking

Early chunking trains on the same batches, but each chunk attends only to itself. Both models are measured on chunks in
their document and alone, in the same modules cut into documents of at most 2, 4, 8 and 16 chunks. Training documents
have at most 8.
"""

from ml_collections import ConfigDict

from configs import base
from configs.ablations import small

CHUNKS = (2, 4, 8, 16)
SHIPPED = (("functions", "functions"), ("contextual", "modules"))


def get_config(arg: str = "") -> ConfigDict:
    config = small.get_config(arg)
    config.data.gin_bindings = (*config.data.gin_bindings, *bindings())
    names = {f"documents of {n}": f"documents_{n}/test" for n in CHUNKS}
    config.evaluations = ConfigDict({name: base.evaluation(data=data, bm25=False) for name, data in names.items()})
    config.ablation.update(checkpoint="contextual", plot="curve")
    alone = {f"evaluations.{name}.alone": True for name in names}
    early = {"stages.contextual.chunking": "early"}
    config.ablation.variants = (
        ("late", {}),
        ("late, measured alone", alone),
        ("early, measured alone", early | alone),
        ("early, measured in context", early),
        ("no document loss", {"stages.contextual.beta": (0.0, 0.0)}),
        ("no in-document loss", {"stages.contextual.alpha": 0.0}),
        ("only in-document loss", {"stages.contextual.alpha": 1.0, "stages.contextual.beta": (0.0, 0.0)}),
    )
    return config


def bindings() -> list[str]:
    """Evaluation sets documents_N/test, as contextual/test of configs/data/python_docs.gin but of at most N chunks."""
    sets = {f"documents_{n}/test": f"held_out.modules_{n}.test" for n in CHUNKS}
    sets |= {
        f"{name}/{split}": f"held_out.{task}.{split}" for name, task in SHIPPED for split in ("development", "test")
    }
    lines = [f"evaluation.sets = {sets!r}"]
    for n in CHUNKS:
        fields = {
            "python_docs.records": "modules",
            "task.kind": "contextual",
            "task.map": "embed.preparation.python_examples:document",
            "task.chunk_length": 64,
            "task.max_context": 64 * n,
            "task.max_chunks": n,
        }
        lines += [f"held_out/modules_{n}/{name} = {value!r}" for name, value in fields.items()]
    return lines
