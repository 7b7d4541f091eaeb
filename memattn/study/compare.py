"""The comparison of Titans with a plain decoder and its peers at equal tokens and parameters."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from memattn._tables import Table
from memattn.checks import check_bool, check_int, must
from memattn.files import write_json
from memattn.parts.base import Sizes
from memattn.parts.titans import TitansConfig
from memattn.study.base import Study, check_list, check_seeds
from memattn.study.cells import Cell, Measure
from memattn.study.compared import MEASURED, PAIRS, measure_run
from memattn.study.results import MEASURES, CellSummary
from memattn.train.config import DataConfig, ModelConfig, TrainConfig, TrainingConfig

VANILLA = "vanilla"
OWN = ("titans", VANILLA)
PEERS = ("mamba2", "qwen3-next")


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Sizes of the first model; the others have its parameters.

    Attributes:
        dim: Features of the hidden states.
        depth: Layers.
        heads: Attention heads.
        dim_head: Features of a head, of attention and of the memory.
        segment_len: Tokens that the attention of Titans spans: a segment, or a window.
        ff_mult: Features inside the MLP, in units of ``dim``.
        memory_dim: Features of the memory, a multiple of ``dim_head``; None means ``dim``.
        use_memory: Whether Titans has its memory; else its attention is alone.
        use_flex_attn: Whether FlexAttention computes the attention of all models.
        variant: The variant of Titans.
    """

    dim: int = 512
    depth: int = 6
    heads: int = 8
    dim_head: int = 64
    segment_len: int = 512
    ff_mult: int = 4
    memory_dim: int | None = None
    use_memory: bool = True
    use_flex_attn: bool = False
    variant: str = "mac"

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "heads", "dim_head", "segment_len", "ff_mult"):
            check_int(name, getattr(self, name), 1)
        check_bool("use_memory", self.use_memory)
        if self.use_flex_attn:
            check_flex_attention()
        if self.use_memory:
            self._check_memory()

    def _check_memory(self) -> None:
        """Raise ValueError for invalid options of Titans, by the names of the options here."""
        heads, D = self.heads, self.dim_head
        sizes = Sizes(self.dim, heads, heads, D, num_layers=self.depth, max_positions=1)
        whole = self.dim if self.memory_dim is None else self.memory_dim
        try:
            part = TitansConfig(variant=self.variant, memory_dim=whole, memory_head_dim=D)
            part.memory_sizes(sizes)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("attention.")) from error

    def model(self, name: str, seq_len: int) -> ModelConfig:
        """Titans or the plain decoder with these sizes."""
        options: dict[str, Any] = dict(
            hidden_size=self.dim,
            num_hidden_layers=self.depth,
            num_attention_heads=self.heads,
            head_dim=self.dim_head,
            intermediate_size=self.ff_mult * self.dim,
            mlp="gelu",
            max_position_embeddings=seq_len,
        )
        if self.use_flex_attn:
            options["backend"] = "flex"
        if name == VANILLA:
            return ModelConfig(preset=VANILLA, options=options)
        if not self.use_memory:
            options |= dict(segment_len=None, window_size=self.segment_len)
            return ModelConfig(preset="segmented", options=options)
        options |= dict(
            variant=self.variant,
            segment_len=self.segment_len,
            window_size=self.segment_len,
            memory_dim=self.dim if self.memory_dim is None else self.memory_dim,
            memory_head_dim=self.dim_head,
        )
        return ModelConfig(preset="titans", options=options)


def check_flex_attention() -> None:
    """Raise NotImplementedError where FlexAttention cannot train."""
    import torch

    if not torch.cuda.is_available():
        has = f"PyTorch {torch.__version__} has no backward of FlexAttention on the CPU"
        must("use_flex_attn", "be left out without CUDA", f"it: {has}", NotImplementedError)


@dataclass(frozen=True, kw_only=True)
class ComparedModels:
    """What is compared.

    Attributes:
        models: ``titans``, ``vanilla``, ``mamba2`` and ``qwen3-next``. The first, one of the former
            two, has the sizes that are given, and each of the others as many parameters.
        seeds: Seeds of weights and order of the text; each model is trained with each.
    """

    models: list[str] = field(default_factory=lambda: list(OWN))
    seeds: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        check_list("models", self.models, (*OWN, *PEERS))
        check_seeds(self.seeds, "seeds")
        if self.models[0] not in OWN:
            must("models", f"begin with {' or '.join(OWN)}, whose sizes are given", self.models[0])
        if VANILLA not in self.models:
            must("models", f"have {VANILLA}, which the others are compared with", self.models)

    @property
    def take_packed_rows(self) -> bool:
        """Whether documents may be packed without padding; models of transformers lack that."""
        return not any(name in PEERS for name in self.models)


@dataclass(frozen=True, kw_only=True)
class CompareStudy(Study):
    """Compare Titans with a plain decoder and its peers at equal tokens and parameters.

    Attributes:
        out: Folder of the runs and results.
        compare: What is compared.
        sizes: Sizes of the first model.
        test: The text whose perplexity is reported: a file or a folder; None means the documents
            that are held out.
        test_name: What that text is called.
        data: The text to train on, of which a part must be held out.
        training: Optimisation. The study sets ``output_dir`` and ``seed`` of each run.
    """

    system: ClassVar[str] = "compare"
    heading: ClassVar[str] = "Titans beside its peers"
    title: ClassVar[str] = "Equal tokens, equal parameters"
    baselines: ClassVar[tuple[str, ...]] = (VANILLA,)
    measures: ClassVar[tuple[Measure, ...]] = MEASURED
    packages: ClassVar[tuple[str, ...]] = ("transformers",)
    folder_option: ClassVar[str] = "output_dir"

    out: str = "./outputs"
    compare: ComparedModels = field(default_factory=ComparedModels)
    sizes: ModelSizes = field(default_factory=ModelSizes)
    test: str | None = None
    test_name: str = "the documents that are held out"
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sizes.use_flex_attn and not self.compare.take_packed_rows:
            peers = [name for name in self.compare.models if name in PEERS]
            must("use_flex_attn", f"be left out with {', '.join(peers)}", "it")
        if self.data.packed and not self.compare.take_packed_rows:
            must("data.packed", f"be false for {', '.join(PEERS)}", "true")
        steps = self.training.num_steps()
        if self.training.warmup_steps >= steps:
            # the learning rate would not be reached
            must("warmup_steps", f"be below steps={steps}", self.training.warmup_steps)

    @property
    def seeds(self) -> list[int]:
        return self.compare.seeds

    @property
    def cell_names(self) -> dict[str, str]:
        """Names of the models by the names of their cells."""
        bare = "titans-without-memory"
        return {
            bare if name == "titans" and not self.sizes.use_memory else name: name
            for name in self.compare.models
        }

    def plan(self, vocab_size: int) -> list[Cell]:
        """The models, the first with the sizes given, the others at its number of parameters."""
        from memattn.study.widths import count_parameters, equal_width

        self._check_lengths()
        self._forget_other_texts()
        first = self.sizes.model(self.compare.models[0], self.data.seq_len)
        target = count_parameters(str(first.preset), first.options, vocab_size)
        cells = []
        for name, kind in self.cell_names.items():
            if kind in PEERS:
                cells.append(self._peer(kind, target))
                continue
            model = self.sizes.model(kind, self.data.seq_len)
            preset, options = str(model.preset), model.options

            def count(width: int, preset: str = preset, options: dict[str, Any] = options) -> int:
                return count_parameters(preset, {**options, "intermediate_size": width}, vocab_size)

            if model != first:
                width = equal_width(name, count, target, "parameters")
                options = {**options, "intermediate_size": width}
            cells.append(
                Cell(
                    name=name,
                    model=ModelConfig(preset=preset, options=options),
                    counts={"parameters": count(options["intermediate_size"])},
                )
            )
        return cells

    def _peer(self, name: str, target: int) -> Cell:
        """A model of transformers; the ones that training starts from are written for each seed."""
        from memattn.study.peers import PeerSizes, count_parameters, peer_config, write_new_model
        from memattn.train.setup import run_tokenizer

        sizes = PeerSizes(
            hidden_size=self.sizes.dim,
            num_layers=self.sizes.depth,
            num_heads=self.sizes.heads,
            head_dim=self.sizes.dim_head,
            seq_len=self.data.seq_len,
        )
        config = peer_config(name, sizes, target, run_tokenizer(self.text_config()))
        for seed in self.seeds:
            if not self._start(name, seed).is_dir():
                write_new_model(config, seed, self._start(name, seed))
        model = ModelConfig(model_path=str(self._start(name, self.seeds[0])))
        return Cell(name=name, model=model, counts={"parameters": count_parameters(config)})

    def _start(self, name: str, seed: int) -> Path:
        return Path(self.out) / name / f"start-{seed}"

    def run_config(self, cell: Cell, seed: int) -> TrainConfig:
        if cell.name in PEERS:
            model = ModelConfig(model_path=str(self._start(cell.name, seed)))
            cell = Cell(name=cell.name, model=model)
        return super().run_config(cell, seed)

    def measure(self, config: TrainConfig) -> dict[str, float]:
        """Perplexity, speed, memory and retrieval of a finished run."""
        return measure_run(config, self.test)

    def _check_lengths(self) -> None:
        """Raise before anything is trained where a row is too short for what is measured."""
        from memattn.study.compared import check_length
        from memattn.train.setup import run_tokenizer

        check_length(run_tokenizer(self.text_config()), self.data.seq_len)

    def _forget_other_texts(self) -> None:
        """Delete the measures of finished runs if the text has changed."""
        file, about = Path(self.out) / "test.json", {"test": self.test}
        if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != about:
            for name in self.cell_names:
                for measured in (Path(self.out) / name).glob(f"*/{MEASURES}"):
                    measured.unlink()
        write_json(file, about)

    def tables(self, rows: Sequence[CellSummary]) -> list[Table]:
        """One table of all models."""
        heads = ["model", "parameters", "validation loss"]
        heads += [measure.head for measure in self.measures]
        cells = [
            (
                row.cell.name,
                f"{row.cell.counts['parameters']:,}",
                row.losses["val_loss"].text(".4f"),
                *(
                    row.losses[measure.name].text(measure_format)
                    if measure.name in row.losses
                    else "-"
                    for measure, measure_format in zip(self.measures, _FORMATS, strict=True)
                ),
            )
            for row in rows
        ]
        return [Table(self.title, tuple(heads), cells)]

    def note(self, rows: Sequence[CellSummary]) -> str:
        n = max(spread.n for row in rows for spread in row.losses.values())
        batches = self.training.eval_batches
        some = "all" if batches is None else f"the first {batches} batches of"
        return (
            f"{'One seed' if n == 1 else f'Mean ± standard deviation over {n} seeds'}. Validation "
            f"loss: {some} held-out documents, at the end, nats per token. Perplexity: "
            f"{self.test_name}, in windows of {self.data.seq_len} tokens; that of a word is exp of "
            "the summed loss over the number of words, which white space separates. Speed: median "
            "of the training steps that are logged. Memory: weights, gradients and activations of "
            "a training step, at the peak. Needle: share of pass keys found in texts of "
            f"{self.data.seq_len} and {2 * self.data.seq_len} tokens, and the loss of a token of "
            f"them; recall: share of the values of {PAIRS} keys. Neither is trained for."
        )


_FORMATS = (",.2f", ",.2f", ",.0f", ",.0f", ".3f", ".3f", ".3f")
