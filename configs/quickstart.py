"""Every stage of the graph on the Python sources of this machine, in minutes on two CPU cores.

    embed pipeline --config=configs/quickstart.py --workdir=runs/quickstart

`runlocal` shrinks everything to a minute or two: --config=configs/quickstart.py:runlocal
"""

from ml_collections import ConfigDict

from embed.config import parse_arg
from embed.models.transformer import SIZES


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(arg, runlocal=False, stage="")
    config = ConfigDict()
    config.seed = 0
    config.stage = arg.stage  # the stage that `embed train` trains: a key of config.stages

    # Sizes by name (embed/models/transformer.py); each is a field that can be overridden: config.model.num_layers.
    config.model = ConfigDict(SIZES["micro" if arg.runlocal else "tiny"])
    config.model.vocab_size = 0  # rows of the embedding table; 0 = as many as the tokenizer has ids
    config.model.tied = True  # whether the embedding table is the diffusion stage's output layer as well
    config.model.rope_theta = 1e4  # positions up to a thousand; 1e6 in Qwen3
    config.model.attention = "auto"  # kernel: splash on TPU, triton on GPU, xla elsewhere; see embed.models.attention
    config.model.dtype = "float32"  # of the compute: bfloat16 on accelerators
    config.model.remat = "none"  # what the backward pass keeps: none (everything), dots, full (a layer's input)
    config.model.unroll = 64  # layers a scan iteration; unrolled is faster on CPU, scanned compiles faster
    config.model.dense_barrier = True  # faster on CPU, see embed.models.transformer.dense

    config.mesh = ConfigDict()  # devices along each axis; one may be -1: all that are left
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.data = ConfigDict()
    config.data.gin_file = "configs/data/python_docs.gin"  # what the data are: tasks, mixtures, lengths
    config.data.gin_bindings = ("evaluation.max_queries = 50",) if arg.runlocal else ()  # over those of the file
    config.data.tokenizer = ""  # a folder or hub id that has one; "" = a SentencePiece vocabulary is trained
    config.data.vocab_size = 512 if arg.runlocal else 8192  # of the SentencePiece model that is trained
    config.data.split_identifiers = True  # case-folded, parse_config and parseConfig become two words
    config.data.limit = 60 if arg.runlocal else 0  # examples a split, 0 = all
    config.data.timeout = 600.0  # seconds that training waits for a batch before it ends with an error; 0 = forever

    config.export = ConfigDict()
    config.export.separator = True  # a separator token between the chunks of a document
    config.export.max_length = 0  # longest text in tokens, 0 = no limit
    config.export.languages = ("en",)  # what the model card says; not known from the run
    config.export.license = ""  # of the weights, as the Hugging Face hub names licenses

    optimizer = ConfigDict()
    optimizer.learning_rate = 4e-3
    optimizer.warmup = 0.05  # fraction of the steps; the paper does not say
    optimizer.decay = 0.3  # fraction of the steps, linear to zero; the paper does not say
    optimizer.b1 = 0.9
    optimizer.b2 = 0.98
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.01
    optimizer.clip = 1.0  # global gradient norm
    optimizer.moment_dtype = "float32"  # of the first moment: bfloat16 saves half of it; the second is float32

    stage = ConfigDict()  # what all stages have
    stage.kind = ""  # diffusion, pair, contextual or triplet: the objective and its batches
    stage.init = ""  # the stage, or folder of `embed convert`, whose checkpoint this one starts from; "" = random
    stage.curriculum = ()  # ((steps, mixture), …)
    stage.optimizer = optimizer
    stage.log_every = 1 if arg.runlocal else 10
    stage.checkpoint_every = 1000
    stage.max_skipped = 10  # steps in a row without a finite loss and gradient, each skipped, before the run ends
    stage.microbatches = 1  # parts of a batch whose activations are held one at a time; 1 = all of it, fastest
    stage.batch = ConfigDict()

    def make(**fields):
        new = stage.copy_and_resolve_references()
        for name, value in fields.items():
            if name == "optimizer":
                new.optimizer.update(value)
            elif name == "batch":
                new.batch = ConfigDict(value)
            else:
                new[name] = value
        return new

    def steps(n):
        return 2 if arg.runlocal else n

    prefixes = (8, 32) if arg.runlocal else (64, 256)  # Matryoshka
    config.stages = ConfigDict()
    config.stages.diffusion = make(
        kind="diffusion",
        curriculum=((steps(60), "diffusion"),),
        left_shift="auto",  # predict a token from the state before it: True, False, auto = if `init` was a causal model
        # Fraction of a device's tokens with room for logits. Of r rows that it holds at a time 1/2 ± 1/(2r) are masked.
        logits_capacity=0.75 if arg.runlocal else 0.55,
        logits_chunk=256,  # tokens of a device whose logits are held at once
        optimizer=dict(learning_rate=2e-3),
        batch=dict(rows=4 if arg.runlocal else 32, length=128, truncate_probability=0.01),
    )
    config.stages.pair = make(
        kind="pair",
        init="diffusion",
        curriculum=((steps(400), "pairs"),),
        matryoshka=prefixes,
        temperature=0.05,  # 0.02 in the paper, at batch 16,384
        margin=0.1,  # of the false-negative mask
        batch=dict(  # groups of examples, each packed into its own rows
            group_size=8 if arg.runlocal else 96,
            groups=2,  # best a multiple of the processes: each builds whole groups
            # So few that documents are cut to about 64 tokens: more pairs a second teach more than longer ones.
            rows_per_group=8 if arg.runlocal else 49,
            length=128,  # tokens a row
            spans=8,  # embeddings a row, at most
            segments=8,  # texts a row, at most
        ),
    )
    config.stages.contextual = make(
        kind="contextual",
        init="pair",
        curriculum=((steps(240), "contextual"),),
        matryoshka=prefixes,
        temperature=0.05,
        margin=0.1,
        optimizer=dict(learning_rate=2e-3),
        alpha=0.2,  # weight of the in-document loss against the in-batch one
        beta=(0.2, 0.5),  # weight of the document-level loss: from, to, on a cosine
        batch=dict(
            group_size=2 if arg.runlocal else 16,  # documents
            groups=2,
            rows_per_group=6 if arg.runlocal else 14,
            length=512,
            spans=32,
            segments=32,
            max_chunks=8,
            max_queries_per_document=4,
        ),
    )
    config.stages.triplet = make(
        kind="triplet",
        init="pair",
        curriculum=((steps(60), "triplet"),),
        matryoshka=prefixes,
        temperature=0.05,  # 0.03 in the paper
        optimizer=dict(learning_rate=1e-3),
        batch=dict(
            group_size=8 if arg.runlocal else 32,
            groups=2,
            rows_per_group=16 if arg.runlocal else 49,
            length=128,
            spans=8,
            segments=8,
            num_negatives=2,
        ),
    )

    config.mining = ConfigDict()  # hard negatives for the triplet stage, by the pair checkpoint
    config.mining.task = "python_docs_summaries"  # whose documents are ranked for its queries
    config.mining.queries = 8192  # at most; 0 = all. The triplet stage sees no others
    config.mining.num_negatives = 4  # a query, at most
    config.mining.rank_window = (5, 50)
    config.mining.margin = 0.05  # below the positive's cosine

    config.merge = ConfigDict()
    config.merge.ratio = 0.8  # of the way from the contextual to the triplet checkpoint
    config.merge.sweep = (
        (0.8,) if arg.runlocal else (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    )  # ratios tried on the development split

    config.sample = ConfigDict()  # the denoising demonstration after the diffusion stage
    config.sample.mask_fraction = 0.5
    config.sample.tokens_per_step = 4
    return config
