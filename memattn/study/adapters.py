"""The study of LoRA, memory and both in a pretrained model."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from memattn.checks import check_int, must
from memattn.files import replacing, write_json
from memattn.study.base import Study, check_list, check_seeds, short_training
from memattn.study.cells import Cell, Measure
from memattn.train.config import DataConfig, LoraConfig, ModelConfig, TrainConfig, TrainingConfig

BASE = "base"
ADAPTERS = ("lora", "memory", "both")


@dataclass(frozen=True, kw_only=True)
class AdaptersCompare:
    """What is attached.

    Attributes:
        adapters: ``lora``, ``memory`` or ``both``. All have the trainable parameters of the LoRA,
            as near as the number of memory tokens allows; ``both`` has half of its rank.
        seeds: Seeds of new weights and order of the text; each is trained with each.
    """

    adapters: list[str] = field(default_factory=lambda: list(ADAPTERS))
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])

    def __post_init__(self) -> None:
        check_list("compare.adapters", self.adapters, ADAPTERS)
        if "lora" not in self.adapters:
            must("compare.adapters", "have lora, which the others are compared with", self.adapters)
        check_seeds(self.seeds)


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The pretrained model.

    Attributes:
        model_path: A Hugging Face causal language model: a folder, a hub name or ``smollm2``, from
            a package. None trains one on the general text first, with the fields below.
        architecture: Its ``model_type``, such as ``qwen3`` or ``llama``.
        sizes: Sizes, keywords of the architecture's configuration.
        vocab_size: Entries of the tokenizer that is trained on the general text.
        training: Optimisation; output_dir is left to the study.
    """

    model_path: str | None = None
    architecture: str = "qwen3"
    sizes: dict[str, Any] = field(
        default_factory=lambda: dict(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=128,
            tie_word_embeddings=True,
        )
    )
    vocab_size: int = 2048
    training: TrainingConfig = field(
        default_factory=lambda: short_training(
            max_steps=400, base_model_lr=2e-3, warmup_steps=40, eval_steps=None
        )
    )

    def __post_init__(self) -> None:
        check_int("base.vocab_size", self.vocab_size, 259)
        if self.training.output_dir != TrainingConfig().output_dir:
            must("base.training.output_dir", "be left to the study", self.training.output_dir)


@dataclass(frozen=True, kw_only=True)
class AdaptersStudy(Study):
    """Compare LoRA, memory and both in a frozen pretrained model, over several seeds.

    All have the same number of trainable parameters and learn a specialist text. The loss on a
    general text is measured as well.

    Attributes:
        out: Folder of the runs and results.
        compare: What is attached.
        base: The pretrained model.
        lora: LoRA; the others get its number of trainable parameters.
        memory: Fields of the memory; num_memory_tokens is left to the study.
        general: The general text, of which a part must be held out.
        data: The specialist text, of which a part must be held out.
        training: Optimisation; output_dir and seed are left to the study.
    """

    system: ClassVar[str] = "adapters"
    heading: ClassVar[str] = "LoRA, memory and both in a pretrained model"
    title: ClassVar[str] = "All adapters at equal trainable parameters"
    baselines: ClassVar[tuple[str, ...]] = (BASE, "lora")
    measures: ClassVar[tuple[Measure, ...]] = (Measure("general_loss", "general loss"),)
    packages: ClassVar[tuple[str, ...]] = ("transformers", "peft")

    out: str = "runs/adapters_small"
    compare: AdaptersCompare = field(default_factory=AdaptersCompare)
    base: BaseModel = field(default_factory=BaseModel)
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=32, alpha=64))
    memory: dict[str, Any] = field(
        default_factory=lambda: dict(
            use_chapters=True,
            num_chapters=16,
            top_k_chapters=4,
            routing_strategy_train="token",
            routing_strategy_inference="token",
            use_low_rank_memory=True,
            low_rank_mode="reduced_dim",
            memory_rank=32,
            memory_layer_placement="every_n",
            memory_layer_n=2,
        )
    )
    general: DataConfig = field(
        default_factory=lambda: DataConfig(dataset_name="wiki", seq_len=128, packed=False)
    )
    data: DataConfig = field(
        default_factory=lambda: DataConfig(
            dataset_name="foldoc", held_out=0.02, seq_len=128, packed=False
        )
    )
    training: TrainingConfig = field(
        default_factory=lambda: short_training(max_steps=200, base_model_lr=2e-3, warmup_steps=20)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.general.held_out == 0.0:
            must("general.held_out", "be above 0 for a study", self.general.held_out)
        if "num_memory_tokens" in self.memory:
            value = self.memory["num_memory_tokens"]
            must("memory.num_memory_tokens", "be left to the study", value)
        for name in ("data", "general"):
            for own in ("tokenizer", "vocab_size"):
                value = getattr(getattr(self, name), own)
                if value is not None:
                    must(f"{name}.{own}", "be null: the tokenizer is that of the base model", value)

    @property
    def seeds(self) -> list[int]:
        return self.compare.seeds

    @property
    def base_path(self) -> str:
        """Path of the pretrained model."""
        return self.base.model_path or str(Path(self.out) / BASE / "model")

    def first_run(self) -> TrainConfig | None:
        """The training of the base model if none is given."""
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # there is one for each time that a model is loaded
        if self.base.model_path is not None:
            return None
        start = Path(self.out) / "new"
        if not start.is_dir():
            self._write_new_model(start)
        data = replace(self.general, tokenizer="bpe", vocab_size=self.base.vocab_size)
        training = replace(self.base.training, output_dir=str(Path(self.out) / BASE))
        return TrainConfig(model=ModelConfig(model_path=str(start)), data=data, training=training)

    def _write_new_model(self, folder: Path) -> None:
        """Write a model with new weights, with which the training of the base model begins."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes = {"vocab_size": self.base.vocab_size, **self.base.sizes}
        try:
            config = AutoConfig.for_model(self.base.architecture, **sizes)
        except ValueError as error:
            allowed = "be a model_type of transformers"
            raise ValueError(
                f"base.architecture must {allowed}, got {self.base.architecture!r}"
            ) from error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.base.training.seed)
            model = AutoModelForCausalLM.from_config(config)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder) as temporary:
            model.save_pretrained(temporary)

    def text_config(self) -> TrainConfig:
        return TrainConfig(model=ModelConfig(model_path=self.base_path), data=self.data)

    def plan(self, vocab_size: int) -> list[Cell]:
        """The unchanged base model, and the adapters at equal trainable parameters."""
        model = ModelConfig(model_path=self.base_path)
        parameters = _count(model)
        target = _count(self._attached(rank=self.lora.rank), trainable=True)
        cells = [
            Cell(
                name=BASE,
                model=model,
                counts={"trainable_parameters": 0, "parameters": parameters},
                fixed=self._losses_of_base(),
            )
        ]
        ranks = {"lora": self.lora.rank, "memory": None, "both": max(1, self.lora.rank // 2)}
        for name in self.compare.adapters:
            rank = ranks[name]
            tokens = None if name == "lora" else self._memory_tokens(name, rank, target)
            attached = self._attached(rank=rank, tokens=tokens)
            trainable = _count(attached, trainable=True)
            cells.append(
                Cell(
                    name=name,
                    model=attached,
                    labels={"lora_rank": rank, "memory_tokens": tokens},
                    counts={
                        "trainable_parameters": trainable,
                        "parameters": parameters + trainable,
                    },
                )
            )
        return cells

    def _attached(self, *, rank: int | None = None, tokens: int | None = None) -> ModelConfig:
        """The frozen base model with LoRA of a rank, and memory of so many tokens."""
        lora = memory = None
        if rank is not None:  # an update of half the rank counts as much
            alpha = max(1, self.lora.alpha * rank // self.lora.rank)
            lora = replace(self.lora, rank=rank, alpha=alpha)
        if tokens is not None:
            memory = {"kind": "chapter_memory", **self.memory, "num_memory_tokens": tokens}
        return ModelConfig(
            model_path=self.base_path,
            lora=lora,
            memory_adapter=memory,
            freeze_base_model=True,
        )

    def _memory_tokens(self, name: str, rank: int | None, target: int) -> int:
        """How many memory tokens bring the trainable parameters nearest to a target."""
        unit = self.memory.get("num_chapters", 100) if self.memory.get("use_chapters") else 1
        first, second = (
            _count(self._attached(rank=rank, tokens=n * unit), trainable=True) for n in (1, 2)
        )
        n = 1 + round((target - first) / (second - first))
        if n < 1:
            raise ValueError(
                f"lora.rank must leave {name} room for a memory at {target:,} trainable "
                f"parameters, got {first:,} with {unit} memory tokens"
            )
        return n * unit

    def measure(self, config: TrainConfig) -> dict[str, float]:
        """The general loss of a finished run."""
        from memattn.train.attached import load_attached

        model = load_attached(Path(config.training.output_dir) / "model")
        return {"general_loss": self._held_out_loss(model, self.general)}

    def _losses_of_base(self) -> dict[str, float]:
        """The losses of the base model on both texts, measured once."""
        from memattn.train.attached import load_base

        file = Path(self.out) / "base.json"
        about = {"base": self.base_path, "general": asdict(self.general), "data": asdict(self.data)}
        if file.is_file():
            known = json.loads(file.read_text(encoding="utf-8"))
            if known["about"] == about:
                return known["losses"]
        model = load_base(ModelConfig(model_path=self.base_path))
        losses = {
            "val_loss": self._held_out_loss(model, self.data),
            "general_loss": self._held_out_loss(model, self.general),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"about": about, "losses": losses})
        return losses

    def _held_out_loss(self, model: Any, data: DataConfig) -> float:
        """Cross-entropy of the held-out part of a text."""
        import torch

        from memattn.train.evaluate_run import answer_losses
        from memattn.train.setup import run_tokenizer

        config = TrainConfig(
            model=ModelConfig(model_path=self.base_path), data=data, training=self.training
        )
        if torch.accelerator.is_available() and not self.training.cpu:
            model = model.to(torch.accelerator.current_accelerator())
        found = answer_losses(config, model, run_tokenizer(config), self.training.batch_size)
        return found["eval_loss"]

    def losses_note(self) -> str:
        names = (self.data.dataset_name, self.general.dataset_name)
        texts = [name if isinstance(name, str) else ", ".join(name) for name in names]
        return (
            f"Validation loss: held-out documents of the specialist text ({texts[0]}), at the end; "
            f"general loss: held-out documents of the general text ({texts[1]}), which {BASE} has "
            "before anything is attached."
        )


def _count(config: ModelConfig, *, trainable: bool = False) -> int:
    """Parameters of a pretrained model with what is attached to it."""
    from memattn.train.attached import load_base

    parameters = load_base(config).parameters()
    return sum(p.numel() for p in parameters if p.requires_grad or not trainable)
