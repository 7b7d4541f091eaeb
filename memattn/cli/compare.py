"""``memattn compare``."""

from typing import Literal


def compare(
    dim: int = 512,
    depth: int = 6,
    heads: int = 8,
    dim_head: int = 64,
    segment_len: int = 512,
    ff_mult: int = 4,
    use_memory: bool = True,
    use_flex_attn: bool = False,
    memory_dim: int | None = None,
    variant: Literal["mac", "mac_parallel", "mag", "mal", "lmm"] = "mac",
    models: tuple[str, ...] = (),
    batch_size: int = 16,
    eval_batch_size: int = 16,
    lr: float = 5e-5,
    steps: int = 10000,
    warmup_steps: int = 1000,
    max_grad_norm: float = 0.5,
    label_smoothing: float = 0.1,
    seeds: tuple[int, ...] = (),
    dataset: str = "wikitext",
    wikitext_version: Literal[2, 103] = 103,
    data_dir: str = "./data",
    tokenizer: str = "bpe",
    vocab_size: int | None = None,
    seq_len: int = 1024,
    output_dir: str = "./outputs",
    save_interval: int = 1000,
    log_interval: int = 100,
    eval_interval: int = 500,
    eval_steps: int = 50,
    cache_dir: str = "~/.cache/memattn",
    max_minutes: float | None = None,
) -> int:
    """Train Titans and a plain decoder at equal tokens and parameters, and compare them.

    It compares perplexity, speed, memory, and recall in long texts. The output folder gets
    results.md, results.json and results.csv, pictures (comparison.png, curves.png, needle.png of
    each model), report.html (a page with all of them and each model's attention and state), and a
    run folder with checkpoints and the trained model for each model. Ctrl-C leaves a checkpoint:
    the same command continues from there and keeps finished models.

    Args:
        dim: Model dimension.
        depth: Number of layers.
        heads: Number of attention heads.
        dim_head: Dimension of each attention head, and of each head of the memory.
        segment_len: Tokens in the segment or window of Titans' attention.
        ff_mult: Width of the MLP, as a multiple of the model dimension.
        use_memory: Use Titans' neural memory; otherwise only its attention.
        use_flex_attn: Compute the attention of all models by FlexAttention.
        memory_dim: Dimension of the memory, a multiple of dim_head; by default that of the model.
        variant: Variant of Titans.
        models: Any of titans, vanilla, mamba2 and qwen3-next; by default titans and vanilla. The
            first has the given sizes. The others get equal parameters by the width of their MLP or,
            for mamba2, by layers and state.
        batch_size: Rows in a training step.
        eval_batch_size: Rows in a forward pass of an evaluation.
        lr: Highest learning rate.
        steps: Training steps of each model.
        warmup_steps: Steps in which the learning rate rises from 0.
        max_grad_norm: Gradients are scaled down to this norm.
        label_smoothing: Share of each target that is spread over the vocabulary, in training.
        seeds: Seeds of weights and order of the text; each model is trained with each seed. Default
            0.
        dataset: wikitext, from data_dir, the cache or the Hugging Face hub; or a corpus (memattn
            data --list), a text file, a folder or a Hugging Face dataset.
        wikitext_version: 103 or 2.
        data_dir: Folder with files of wikitext, such as train.txt and test.txt. Perplexity is
            reported on its test text, whatever the dataset is.
        tokenizer: bpe, which is trained on the text, bytes, or a folder or hub name.
        vocab_size: Entries of a tokenizer that is trained; by default 4096.
        seq_len: Tokens in a row.
        output_dir: Folder of the results.
        save_interval: Steps from one checkpoint to the next.
        log_interval: Steps from one row of metrics to the next.
        eval_interval: Steps from one evaluation to the next.
        eval_steps: Batches of held-out text in an evaluation.
        cache_dir: Folder for fetched corpora, tokenizers and tokens.
        max_minutes: Stop with a checkpoint after this many minutes; the same command continues.
    """
    from memattn.study.compare import ComparedModels, CompareStudy, ModelSizes
    from memattn.study.compare_report import write_pictures
    from memattn.study.compare_text import find_text
    from memattn.study.run import run_study
    from memattn.train.config import DataConfig, TrainingConfig

    compared = ComparedModels(
        models=list(models) or ComparedModels().models, seeds=list(seeds) or [0]
    )
    sizes = ModelSizes(
        dim=dim,
        depth=depth,
        heads=heads,
        dim_head=dim_head,
        segment_len=segment_len,
        ff_mult=ff_mult,
        memory_dim=memory_dim,
        use_memory=use_memory,
        use_flex_attn=use_flex_attn,
        variant=variant,
    )
    text = find_text(dataset, data_dir=data_dir, version=wikitext_version, cache_dir=cache_dir)
    study = CompareStudy(
        out=output_dir,
        compare=compared,
        sizes=sizes,
        test=text.test,
        test_name=text.test_name,
        data=DataConfig(
            dataset_name=text.train,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            seq_len=seq_len,
            packed=compared.take_packed_rows,
            cache_dir=cache_dir,
        ),
        training=TrainingConfig(
            max_steps=steps,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            base_model_lr=lr,
            warmup_steps=warmup_steps,
            max_grad_norm=max_grad_norm,
            label_smoothing=label_smoothing,
            log_steps=log_interval,
            eval_steps=eval_interval,
            eval_batches=eval_steps,
            save_steps=save_interval,
        ),
    )
    if run_study(study, max_minutes=max_minutes) is not None:
        write_pictures(study)
    return 0
