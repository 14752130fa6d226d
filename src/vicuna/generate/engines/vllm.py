"""The vLLM engine: the same interface over vLLM's offline API, for machines that have it.

Written against the documentation of vLLM 0.20 (`LLM`, `SamplingParams`, `LoRARequest`) and tested
with a stand-in of the same surface; it was not run against vLLM itself.

vLLM keeps what it computed in a cache of its own, found again by the tokens in front
(`enable_prefix_caching`): a row is asked for as its whole path, and only its new tokens are
computed. Logits come back as Python objects, one for each token of the vocabulary, so a step costs
more than with the other engines: this one is for large models on several GPUs, not for speed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vicuna.config import AnswerSettings
from vicuna.config.precisions import PRECISIONS
from vicuna.errors import UserError
from vicuna.generate.engines.base import (
    Cancelled,
    Engine,
    check_adapter,
    check_loaded,
    check_rows,
    never,
    refuse_setting,
    reset_on_failure,
)
from vicuna.model import adapter as adapters
from vicuna.model import adapter_fit
from vicuna.model.adapter import AdapterFiles
from vicuna.model.base import locate
from vicuna.model.config_files import read_config

# The ranks vLLM reserves memory for; an adapter's is rounded up to one of them.
_RANKS = (8, 16, 32, 64, 128, 256, 512)


def library() -> Any:
    """The module `vllm`.

    Raises: UserError where it is not installed.
    """
    if find_spec("vllm") is None:
        raise UserError(
            "vLLM is not installed",
            where="engine vllm",
            fix="pip install vllm (it needs Linux, a GPU and its own build of torch: best in an "
            "environment of its own), or leave out --engine.",
        )
    import vllm

    return vllm


def load_engine(
    base: str, settings: AnswerSettings, files: AdapterFiles | None
) -> tuple[Engine, Path]:
    """A base in vLLM: `base.load_engine` for "vllm"."""
    refuse_setting(settings, "device_map", "vLLM places the layers itself")
    refuse_setting(settings, "cache_type", "vLLM's cache has types of its own")
    library()
    folder = locate(base)
    check_adapter(files, base, folder, settings)
    auto = settings.precision == "auto"
    dtype = "auto" if auto else PRECISIONS[settings.precision].vllm
    if not dtype:
        raise UserError(
            "{precision} is not passed on to vLLM",
            precision=settings.precision,
            where="precision",
            fix="Use auto, fp32, bf16 or fp16, or a base that is quantised on disk.",
        )
    rank = files.lora.largest if files else 0
    return VllmEngine(folder, settings.context_length, dtype, lora_rank=rank), folder


class VllmEngine:
    """An `Engine` over vLLM. Its logits are log-probabilities.

    Args:
        folder: the base, in Hugging Face's layout.
        context_length: tokens that a prompt and its answer may have together; 0: the model's own.
        dtype: vLLM's name of a type, or `auto`.
        max_rows: rows that `step` takes at most.
        lora_rank: the largest rank of adapters that will be loaded; 0: none will.

    Raises: UserError where vLLM is not installed.
    """

    about = "vLLM (experimental: has not been run on a GPU)"

    def __init__(
        self,
        folder: Path,
        context_length: int = 0,
        dtype: str = "auto",
        max_rows: int = 16,
        lora_rank: int = 0,
    ) -> None:
        vllm = library()
        self._folder = folder
        config = read_config(folder)
        self.max_rows = max_rows
        self.context_length = context_length or int(config["max_position_embeddings"])
        self._vocabulary_size = int(config["vocab_size"])
        self._llm = vllm.LLM(
            model=str(folder),
            dtype=dtype,
            max_model_len=self.context_length,
            max_num_seqs=max_rows,
            max_logprobs=-1,
            enable_prefix_caching=True,
            **_lora_options(lora_rank),
        )
        # One token is drawn and thrown away: what is wanted are the logits it was drawn from.
        self._params = vllm.SamplingParams(
            max_tokens=1, temperature=0.0, logprobs=-1, detokenize=False
        )
        self._takes_adapters = bool(lora_rank)
        self._adapters: dict[str, Any] = {}
        self._adapter: Any = None
        self._rows: list[list[int]] = []

    def prefill(self, prompt_ids: Sequence[int], cancel: Callable[[], bool] = never) -> Tensor:
        """As `Engine.prefill`; `cancel` is asked once: vLLM computes a prompt in one call."""
        if cancel():
            raise Cancelled
        self._rows = [list(prompt_ids)]
        return self._logits()[0]

    def step(self, token_ids: Sequence[int], parents: Sequence[int]) -> Tensor:
        check_rows(token_ids, parents, len(self._rows), self.max_rows)
        self._rows = [[*self._rows[p], t] for t, p in zip(token_ids, parents)]
        return self._logits()

    def reset(self) -> None:
        """Drop everything, vLLM's own cache included."""
        self._rows = []
        self._llm.reset_prefix_cache()

    def load_adapter(self, name: str, files: AdapterFiles | Path) -> None:
        """Register a LoRA adapter. vLLM reads it when it is first used.

        Args:
            files: an adapter; or a folder in PEFT's layout.

        Raises: UserError if it does not fit the base, or the folder is not in that layout.
        """
        if not self._takes_adapters:
            raise UserError(
                "vLLM takes adapters only where it was opened with one",
                fix="Name one when the model is loaded: --adapter RUN, vicuna.load(adapter=...).",
            )
        if isinstance(files, Path):
            folder = files
        else:
            adapter_fit.check_weights(files, self._folder)
            folder = adapters.plain_folder(files)
        needed = ("adapter_config.json", "adapter_model.safetensors")
        missing = [f for f in needed if not (folder / f).is_file()]
        if missing:
            raise UserError(
                "vLLM reads adapters in PEFT's layout of today only; {missing} is missing",
                missing=missing[0],
                where=str(folder),
                fix="Answer with --engine torch, which reads adapters of any age.",
            )
        library()
        from vllm.lora.request import LoRARequest

        self._adapters[name] = LoRARequest(name, len(self._adapters) + 1, str(folder))

    def close(self) -> None:
        """Drop the rows and the cache; vLLM frees its weights with this object."""
        self.reset()

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter; none is chosen now."""
        self.use_adapters({})
        del self._adapters[name]

    def use_adapters(self, mix: Mapping[str, float]) -> None:
        """Answer with this adapter from now on, or with the base alone. Rows are dropped.

        Args:
            mix: at most one adapter, of strength 1: vLLM neither scales nor mixes. What has
                strength 0 does not count.

        Raises: UserError where no adapter of this name was loaded, or vLLM cannot do it.
        """
        check_loaded(mix, self._adapters)
        active = {name: strength for name, strength in mix.items() if strength}
        if len(active) > 1:
            raise UserError(
                "vLLM answers with one adapter at a time, not with {count}",
                count=len(active),
                fix="Merge them into one, or use another engine.",
            )
        for strength in active.values():
            if strength != 1:
                raise UserError(
                    "vLLM cannot scale an adapter by {strength}",
                    strength=strength,
                    fix="Use strength 1 or 0, or another engine.",
                )
        self._rows = []  # vLLM's cache tells adapters apart by itself
        self._adapter = next((self._adapters[name] for name in active), None)

    def _logits(self) -> Tensor:
        """Log-probabilities of the next token after each row (n, V)."""
        prompts = [{"prompt_token_ids": row} for row in self._rows]
        with reset_on_failure(self):
            outputs = self._llm.generate(
                prompts, self._params, use_tqdm=False, lora_request=self._adapter
            )
        return torch.stack([self._row(output.outputs[0].logprobs[0]) for output in outputs])

    def _row(self, logprobs: Any) -> Tensor:
        """(V,) from vLLM's mapping of token ids to `Logprob`."""
        row = torch.full((self._vocabulary_size,), -torch.inf)
        ids = torch.tensor(list(logprobs))
        row[ids] = torch.tensor([entry.logprob for entry in logprobs.values()])
        return row


def _lora_options(rank: int) -> dict[str, Any]:
    if not rank:
        return {}
    room = next((r for r in _RANKS if r >= rank), None)
    if room is None:
        raise UserError(
            "vLLM takes adapters up to rank {max_rank}, this one has {rank}",
            max_rank=_RANKS[-1],
            rank=rank,
        )
    return {"enable_lora": True, "max_lora_rank": room}
