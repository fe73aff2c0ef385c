"""Every field of a run's config, with its meaning and default. The other configs build on this one.

    from configs import base

    config = base.get_config()
    config.stages.pair = base.stage("pair", init="diffusion", curriculum=((400, "pairs"),), temperature=0.05)

Defaults are those of pplx-embed (arXiv 2602.11151) where they are known. Fields under `execution` (of the run or of a
stage) and under `card` cannot change a result and may differ at every start. All others are part of a stage's identity.
"""

from ml_collections import ConfigDict

from embed.models.transformer import SIZES


def get_config(arg: str = "") -> ConfigDict:
    """A run without stages."""
    if arg:
        raise ValueError(f"configs/base.py takes no argument, got {arg!r}; it has no stages, so build a config on it")
    config = ConfigDict()
    config.seed = 0
    config.stage = ""  # the stage that `embed train` trains: a key of config.stages

    # Sizes by name (embed/models/transformer.py); each is a field: config.model.num_layers.
    config.model = ConfigDict(SIZES["0.6b"])
    config.model.vocab_size = 0  # rows of the embedding table; 0 = the number of ids of the tokenizer
    config.model.tied = True  # whether the embedding table is also the output layer of stages that predict tokens
    config.model.rope_theta = 1e6
    config.model.norm_eps = 1e-6
    config.model.dtype = "bfloat16"  # of the compute: bfloat16 on accelerators, float32 on CPU

    config.data = ConfigDict()
    config.data.directory = ""  # prepared data, which any number of runs may read; "" = WORKDIR/data
    config.data.gin_file = ""  # defines the data: tasks, mixtures, lengths
    config.data.gin_bindings = ()  # override those of the file
    config.data.root = ""  # the folder that {data_root} in the file stands for; --data_root sets it
    config.data.tokenizer = ""  # a folder or hub id with a tokenizer; "" = train a SentencePiece vocabulary
    config.data.mask_id = -1  # the diffusion mask of a tokenizer.json; -1 = the first id after the vocabulary
    config.data.vocab_size = 8192  # of the trained SentencePiece model
    config.data.split_identifiers = True  # lower-case, and split parse_config and parseConfig into two words
    config.data.seed = 0  # of the order of examples, and of the sample that the vocabulary is trained on
    config.data.limit = 0  # rows per task; 0 = all
    config.data.separator = True  # put a separator token between the chunks of a document

    # The graph: {name: stage(…)}, {name: mining(…)} and so on. A checkpoint is a stage, a merge, `random init`, a stage
    # folder of another run, a model folder or a hub id.
    for part in ("stages", "mining", "merges", "exports", "evaluations"):
        config[part] = ConfigDict()

    config.report = ConfigDict()  # what the report of `embed pipeline` shows besides the figures
    config.report.denoise = ""  # a diffusion stage: its bound is measured and it denoises a text; "" = none
    config.report.texts = ""  # SET/SPLIT of the data's evaluation sets, or a folder: the texts for both
    config.report.mask_fraction = 0.5  # of the denoised text
    config.report.tokens_per_step = 4  # tokens that denoising unmasks at once
    config.report.search = ""  # an export that answers an example query; "" = none
    config.report.fuse = ()  # checkpoints whose rankings are fused with BM25's
    config.report.baseline = ""  # the checkpoint that others are compared with, query by query; "" = BM25

    config.ablation = ConfigDict()  # what `embed ablate` compares
    # ((name, {"stages.pair.pooling": "last", …}), …): the fields in which each variant differs from this config. Others
    # are compared with the first.
    config.ablation.variants = ()
    config.ablation.checkpoint = ""  # a stage or merge; evaluations measure it. A variant may have another
    config.ablation.seeds = (0, 1, 2)  # values of config.seed
    config.ablation.plot = "dots"  # or curve: over evaluations whose names end in a number

    config.card = ConfigDict()  # fields of the model card that the run does not determine
    config.card.languages = ()  # ("en", …)
    config.card.license = ""  # of the weights, an identifier of the Hugging Face hub

    config.execution = ConfigDict()
    config.execution.mesh = ConfigDict()  # devices along each axis; one axis may be -1: the remaining devices
    config.execution.mesh.data = 1
    config.execution.mesh.fsdp = -1
    config.execution.mesh.tensor = 1
    config.execution.attention = "auto"  # splash on TPU, triton on GPU, xla elsewhere; see embed.models.attention
    # Rematerialization: full keeps only the input of each layer for the backward pass, dots products, none everything.
    config.execution.remat = "full"
    config.execution.unroll = 1  # layers per scan iteration; unrolled is faster on CPU, scanned compiles faster
    config.execution.dense_barrier = False  # faster on CPU, see embed.models.transformer.dense
    config.execution.readers = 0  # processes that read batches, each of them whole batches; 0 = a thread
    config.execution.cache_bytes = 1 << 28  # of prepared data in memory, of all tasks together; each reader has as many
    config.execution.read_timeout = 600.0  # seconds that training waits for a batch before it ends; 0 = forever
    return config


def stage(kind: str, **changes) -> ConfigDict:
    """A stage of one of the kinds; `changes` override fields, nested ones as dictionaries."""
    new = ConfigDict()
    # causal, diffusion, pair, contextual, triplet, distill or late_interaction: the objective and its batches
    new.kind = kind
    new.init = ""  # the checkpoint that the stage starts from; "" = random
    new.init_step = 0  # a step of an unfinished stage to start from; 0 = the last step of a finished one
    new.curriculum = ()  # ((steps, mixture), …); a mixture is one of the gin file, a mined task or {task: rate}

    # AdamW. The paper does not say warmup, decay, b1, b2, eps, weight_decay and clip.
    new.optimizer = ConfigDict()
    new.optimizer.learning_rate = 2e-4  # the peak
    new.optimizer.embedding_rate = 1.0  # learning rate of the embedding table, as a multiple of the layers'
    new.optimizer.warmup = 0.01  # fraction of the steps
    new.optimizer.decay = 0.1  # fraction of the steps, linear to zero
    new.optimizer.b1 = 0.9
    new.optimizer.b2 = 0.95
    new.optimizer.eps = 1e-8
    new.optimizer.weight_decay = 0.1
    new.optimizer.clip = 1.0  # global gradient norm; 0 = none
    new.optimizer.moment_dtype = "float32"  # of the first moment; bfloat16 halves its memory. The second is float32

    new.batch = ConfigDict()
    new.batch.length = 1024  # tokens per row; the contextual model reads longer documents in windows of this length

    new.execution = ConfigDict()
    new.execution.microbatches = 1  # number of parts of a batch, computed one after the other; 1 is fastest
    new.execution.log_every = 10  # steps
    new.execution.checkpoint_every = 500  # steps
    new.execution.keep = 2  # number of newest checkpoints that are kept
    new.execution.milestone_every = 0  # steps; checkpoints saved at multiples of it are kept forever; 0 = none
    new.execution.evaluate_every = 0  # steps; the best checkpoint is kept too; 0 = never
    # SET/SPLITs of the data, or folders of evaluation sets; () = all SET/development. The figure is mean nDCG@10, int8
    # (of a late-interaction stage MaxSim).
    new.execution.evaluate_on = ()
    # A step without a finite loss and gradient is skipped; more than this many in a row end the run.
    new.execution.max_skipped = 10

    if kind == "diffusion":
        new.left_shift = "auto"  # predict a token from the state before it: True, False, auto = as the parent did
        # Distribution of the masked share t of a row: stratified and independent are uniform, bell is not. fixed is
        # masked-token prediction as in LLM2Vec: t = mask_ratio.
        new.noise = "stratified"
        new.mask_ratio = 0.2  # LLM2Vec's; only for noise="fixed"
        # The first share of the steps, in which attention opens from causal to bidirectional; 0 = it is open at once.
        # Above 0, plain XLA computes the attention of the whole stage.
        new.anneal = 0.0
    if kind in ("causal", "diffusion"):
        new.batch.rows = 1024
        new.batch.length = 4096
        new.batch.truncate_probability = 0.01  # of a row, which is then cut to a random length
        new.execution.logits_chunk = 2048  # tokens whose logits a device holds at once
    elif kind in ("pair", "contextual", "triplet", "distill", "late_interaction"):
        new.attention = "bidirectional"  # or causal
        new.temperature = 0.02
        # A batch consists of groups of examples. Each group is packed into its own rows.
        new.batch.group_size = 128  # examples (in a contextual stage, documents)
        new.batch.groups = 128  # best a multiple of the number of processes, because each builds whole groups
        new.batch.rows_per_group = 32  # 0 = chosen from the lengths of the data
        new.batch.spans = 32  # maximum of embeddings per row
        new.batch.segments = 32  # maximum of texts per row
        new.batch.homogeneous = False  # whether all examples of a batch are from one task
    else:
        kinds = "causal, diffusion, pair, contextual, triplet, distill, late_interaction"
        raise ValueError(f"stage kind {kind!r} must be one of {kinds}")
    if kind in ("pair", "contextual", "triplet", "distill"):
        new.pooling = "mean"  # of a text's hidden states, or last: the state of its last token
        # Of pooled vectors in training: int8, tanh (the same without rounding) or none. They are compared by cosine.
        new.quantization = "int8"
        new.matryoshka = (128, 256, 512, 1024)  # prefixes of a vector that are trained
        new.matryoshka_weights = ()  # of the losses of the prefixes; () = equal
        new.spread_out = 0.0  # weight of a term that spreads vectors over the sphere, for binary; 0 = none
    if kind in ("pair", "contextual"):
        new.margin = 0.1  # of the false-negative mask; 2 = no mask, because cosines differ by at most 2
        new.query_negatives = True  # whether the other queries of a batch are negatives too
    if kind == "contextual":
        new.chunking = "late"  # chunks are pooled from states that saw their document; early: only themselves
        new.alpha = 0.2  # weight of the in-document loss; 1 - alpha is that of the in-batch loss
        new.beta = (0.2, 0.5)  # weight of the document-level loss: (start, end), on a cosine
        new.batch.max_chunks = 16  # per document
        new.batch.max_queries_per_document = 4
    if kind == "triplet":
        new.temperature = 0.03
        new.batch.num_negatives = 4  # maximum per query
    if kind == "distill":
        new.teacher_dimensions = 1024  # numbers of each vector of the teacher, as the data have them
        new.cosine = 1.0  # weight of 1 - the cosine of the student's and the teacher's vector of a text
        new.mse = 0.0  # weight of their mean squared error, before quantization and normalization
        new.kl = 1.0  # weight of the KL divergence of similarities to the other texts of a batch, at the temperature
        new.temperature = 0.05
    if kind == "late_interaction":
        new.token_dimensions = 128  # of the vector of a token
        new.temperature = 1.0  # of a sum over the tokens of a query, as in ColBERT
        new.batch.max_query_tokens = 64  # longer texts are cut
        new.batch.max_document_tokens = 512
    return _changed(new, changes)


def mining(**changes) -> ConfigDict:
    """A task of hard negatives for the queries of other tasks. A curriculum can use its name like a task's."""
    new = ConfigDict()
    new.checkpoint = ""  # ranks the documents
    new.step = 0  # a step of an unfinished stage; 0 = the last step of a finished one
    new.tasks = ()  # ("a", "b"): for the queries of these tasks
    new.pool = "own"  # the documents that are ranked for a query: own = those of its task, union = those of all tasks
    new.precision = "int8"  # of the vectors; training compares int8
    new.queries = 0  # maximum per task; 0 = all
    new.num_negatives = 4  # maximum per query
    new.rank_window = (0, 100)  # documents at ranks lo..hi-1 are candidates, 0 = best; the paper does not say
    new.margin = 0.05  # a negative must score this much below the positive, -2 = any score; the paper does not say
    new.relative = False  # whether the margin is a fraction of the positive's score
    new.teacher = ""  # a checkpoint whose float32 cosines the margin compares; "" = those of the ranking
    return _changed(new, changes)


def merge(**changes) -> ConfigDict:
    """A mixture of two checkpoints."""
    new = ConfigDict()
    new.of = ("", "")
    new.method = "slerp"  # or linear
    new.ratio = 0.5  # position between the first (0) and the second (1); the paper does not say
    new.sweep = ()  # ratios to try
    new.sweep_on = ()  # these sets: SET/SPLIT of the data, or folders
    new.alone = False  # whether the sweep encodes each chunk of a document separately
    return _changed(new, changes)


def export(**changes) -> ConfigDict:
    """A model folder WORKDIR/export/NAME."""
    new = ConfigDict()
    new.checkpoint = ""
    new.contextual = False  # whether it is the contextual model; affects the card and the class in other programs
    new.max_length = 32768  # longest text in tokens; 0 = no limit
    return _changed(new, changes)


def evaluation(**changes) -> ConfigDict:
    """Retrieval metrics of checkpoints on one set, at every precision."""
    new = ConfigDict()
    new.data = ""  # SET/SPLIT of the data's evaluation sets, or a folder
    new.alone = False  # whether each chunk of a document is encoded separately
    new.rope_theta = 0.0  # of the encoder; 0 = that of its training
    new.truncate_dim = 0  # dimensions of the vectors, a prefix; 0 = all
    new.needle_tokens = 0  # texts of this length, each with one relevant text hidden among others; 0 = the texts
    new.checkpoints = ()
    new.bm25 = True  # whether to evaluate the lexical baseline too
    return _changed(new, changes)


def shrink(config: ConfigDict) -> None:
    """`runlocal`: two steps per stage with a few examples each, on a small part of this machine's Python sources."""
    config.data.update(
        gin_file="configs/data/python_docs.gin", gin_bindings=("evaluation.max_queries = 50",), vocab_size=512, limit=60
    )
    contrastive = dict(groups=2, length=128, spans=8, segments=8)
    batches = {
        "causal": dict(rows=4, length=128),
        "diffusion": dict(rows=4, length=128),
        "pair": contrastive | dict(group_size=8, rows_per_group=8),
        "contextual": dict(group_size=2, groups=2, rows_per_group=6, length=512, spans=32, segments=32, max_chunks=8),
        "triplet": contrastive | dict(group_size=8, rows_per_group=16, num_negatives=2),
        "distill": contrastive | dict(group_size=8, rows_per_group=8),
        "late_interaction": contrastive | dict(group_size=8, rows_per_group=8),
    }
    for each in config.stages.values():
        each.curriculum = tuple((2, mixture) for _, mixture in each.curriculum)
        each.execution.log_every = 1
        each.batch.update(batches[each.kind])
        if "matryoshka" in each:
            each.matryoshka, each.matryoshka_weights = (8, 32), each.matryoshka_weights and (1.0, 1.0)
    for each in config.merges.values():
        each.sweep = each.sweep and (each.ratio,)
    config.ablation.seeds = config.ablation.seeds[:2]


def _changed(new: ConfigDict, changes: dict) -> ConfigDict:
    new.lock()
    new.update(changes)
    return new.unlock()
