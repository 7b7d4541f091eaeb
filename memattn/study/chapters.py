"""The study of chapter memory, against a dense decoder of equal operations."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from memattn.checks import must
from memattn.study.base import Study, check_list, check_seeds, short_training
from memattn.study.cells import Cell
from memattn.train.config import DataConfig, ModelConfig, TrainingConfig

PLAIN, DENSE = "plain", "dense"
# what compare says of the memory; both modes have the same routing
LEFT_TO_COMPARE = ("use_chapters", "routing_strategy_train", "routing_strategy_inference")


@dataclass(frozen=True, kw_only=True)
class ChaptersCompare:
    """The models that are compared.

    Attributes:
        strategies: How chapters are selected; one model for each of: ``token``, ``sequence``,
            ``rolling``, ``hybrid``. All of them are causal.
        seeds: Seeds of weights and order of the text; each model is trained with each.
    """

    strategies: list[str] = field(default_factory=lambda: ["token", "sequence", "rolling"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])

    def __post_init__(self) -> None:
        from memattn.nn.chapter_routing import STRATEGIES

        check_list("compare.strategies", self.strategies, STRATEGIES)
        check_seeds(self.seeds)


@dataclass(frozen=True, kw_only=True)
class ChaptersStudy(Study):
    """Compare chapter memory with a dense decoder of equal operations, over several seeds.

    The model plain is the decoder without a memory. The model dense has a wider MLP, so that its
    forward pass has as many operations as the memory transformer.

    Attributes:
        out: Folder of the runs and results.
        compare: The models that are compared.
        sizes: Sizes of every model, keywords of the presets; dense has an intermediate_size of its
            own.
        memory_options: Further keywords of the memory, such as num_chapters.
        data: The text, of which a part must be held out.
        training: Optimisation; output_dir and seed are left to the study.
    """

    system: ClassVar[str] = "chapters"
    heading: ClassVar[str] = "Chapter memory against a dense decoder of equal operations"
    title: ClassVar[str] = f"All models; {DENSE} has the operations of the memory transformers"
    baselines: ClassVar[tuple[str, ...]] = (DENSE, PLAIN)

    out: str = "runs/chapters_small"
    compare: ChaptersCompare = field(default_factory=ChaptersCompare)
    sizes: dict[str, Any] = field(
        default_factory=lambda: dict(
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=128,
        )
    )
    memory_options: dict[str, Any] = field(
        default_factory=lambda: dict(
            num_memory_tokens=512,
            num_chapters=32,
            top_k_chapters=4,
            routing_block_size=16,
            routing_window_size=32,
        )
    )
    data: DataConfig = field(default_factory=lambda: DataConfig(vocab_size=1024, seq_len=128))
    training: TrainingConfig = field(
        default_factory=lambda: short_training(max_steps=200, base_model_lr=3e-3, warmup_steps=20)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in LEFT_TO_COMPARE:
            if name in self.memory_options:
                value = self.memory_options[name]
                must(f"memory_options.{name}", "be left to compare.strategies", value)

    @property
    def seeds(self) -> list[int]:
        return self.compare.seeds

    def plan(self, vocab_size: int) -> list[Cell]:
        """The plain decoder, the dense one, and one memory transformer for each strategy."""
        from memattn.evaluate import estimate
        from memattn.study.widths import equal_width, make_config

        def count(preset: str, options: dict[str, Any]) -> dict[str, int]:
            found = estimate(make_config(preset, options, vocab_size), self.data.seq_len)
            per_token = round(found.flops / self.data.seq_len)
            return {"parameters": found.parameters, "flops_per_token": per_token}

        def wider(width: int) -> int:
            options = {**self.sizes, "intermediate_size": width}
            return count("vanilla", options)["flops_per_token"]

        memories = {}
        for strategy in self.compare.strategies:
            routing = {
                "use_chapters": True,
                "routing_strategy_train": strategy,
                "routing_strategy_inference": strategy,
            }
            memories[strategy] = {**self.sizes, **self.memory_options, **routing}
        counts = {name: count("memory_transformer", opts) for name, opts in memories.items()}
        target = max(of_one["flops_per_token"] for of_one in counts.values())
        width = equal_width(DENSE, wider, target, "operations for a token")
        dense = {**self.sizes, "intermediate_size": width}
        cells = [
            Cell(
                name=name,
                model=ModelConfig(preset="vanilla", options=options),
                counts=count("vanilla", options),
            )
            for name, options in ((PLAIN, dict(self.sizes)), (DENSE, dense))
        ]
        cells += [
            Cell(
                name=name,
                model=ModelConfig(preset="memory_transformer", options=options),
                counts=counts[name],
            )
            for name, options in memories.items()
        ]
        return cells

    def losses_note(self) -> str:
        return (
            "Validation loss: cross-entropy of held-out documents, at the end. Operations are "
            f"those of the forward pass for a token of a sequence of {self.data.seq_len}, as "
            f"`memattn estimate` counts them; {DENSE} has those of the memory transformer with the "
            "most. In a batch, keys and values of the memory are projected once for all sequences, "
            f"so that it does less than is counted. {PLAIN} is the decoder without memory. "
            "Routing is causal: chapters are selected by the tokens up to the one that reads them, "
            "in training and in evaluation."
        )
