"""The offline API: `LLM` runs lists of prompts through the engine and returns when all are done."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, no_type_check

from tqdm import tqdm

from jaxserve.beam_search import BeamSearchOutput, beam_search
from jaxserve.config import EngineArgs
from jaxserve.engine.engine import LLMEngine
from jaxserve.engine.metrics import Metric
from jaxserve.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from jaxserve.types import PromptType, Request, RequestOutput

Message = Mapping[str, Any]
OnError = Literal["raise", "return"]


@dataclass(frozen=True)
class Prepared:
    """One prompt of a call, checked: a request, or what is wrong with the prompt."""

    request_id: str
    request: Request | None
    failure: RequestOutput | None = None


@no_type_check  # for annotation checkers: whatever a caller passes gets a message of its own
class LLM:
    """An engine for offline inference.

    Args:
        model: a folder, a GGUF file or a Hugging Face hub id; None is the embedded model of the extra `demo`.
        **engine_args: every field of `EngineArgs`, under vLLM's names.

    Raises:
        TypeError: an unknown argument.
        ValueError: an argument, the model's files or the memory do not fit; the message says what to change.
    """

    def __init__(self, model: str | None = None, **engine_args: Any):
        self.llm_engine = LLMEngine.from_engine_args(EngineArgs(model=model, **engine_args))
        self._ids = itertools.count()
        self._queued: list[Prepared] = []

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> "LLM":
        """Build from a ready `EngineArgs`."""
        return cls(**vars(engine_args))

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        on_error: OnError = "raise",
    ) -> list[RequestOutput]:
        """Generate for every prompt; outputs come in the order of the prompts.

        Args:
            prompts: one prompt or a list: text, token ids, `TextPrompt` or `TokensPrompt`.
            sampling_params: one for all or one a prompt; None takes the model's defaults. Never changed.
            use_tqdm: show a progress bar with input and output tokens per second.
            priority: one number a prompt, lower runs first (with `scheduling_policy="priority"`).
            tokenization_kwargs: truncate_prompt_tokens, truncation_side, add_special_tokens, max_length.
            on_error: "raise" finds a bad prompt before anything runs; "return" gives it an output with
                `finish_reason="error"` and its message in `error` while the others complete.

        Raises:
            TypeError, ValueError: a bad argument, or with `on_error="raise"` a bad prompt.
        """
        self.enqueue(
            prompts, sampling_params, priority=priority, tokenization_kwargs=tokenization_kwargs, on_error=on_error
        )  # fmt: skip
        return self.wait_for_completion(use_tqdm=use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        on_error: OnError = "raise",
    ) -> list[RequestOutput]:
        """Generate the next message of one conversation or of a list of them, through the chat template.

        Raises:
            TypeError, ValueError: bad messages, no chat template, or as `generate` does.
        """
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        options = dict(
            chat_template=chat_template or self.llm_engine.config.chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            **(chat_template_kwargs or {}),
        )
        tokenizer = self.llm_engine.tokenizer
        if tokenizer is None:
            raise ValueError("chat needs the tokenizer's chat template; do not set skip_tokenizer_init=True.")
        prompts: list[PromptType | Exception] = []
        for conversation in conversations:
            try:
                prompts.append({"prompt": tokenizer.render_chat(conversation, **options)})  # type: ignore[arg-type]
            except (TypeError, ValueError) as error:
                if on_error == "raise":
                    raise
                prompts.append(error)
        self._enqueue(prompts, sampling_params, None, {"add_special_tokens": False}, on_error)
        return self.wait_for_completion(use_tqdm=use_tqdm)

    def enqueue(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        on_error: OnError = "raise",
    ) -> list[str]:
        """Check and queue prompts without running them; returns request ids. Arguments as in `generate`."""
        return self._enqueue(_as_list(prompts), sampling_params, priority, tokenization_kwargs, on_error)

    def _enqueue(
        self,
        prompts: Sequence[PromptType | Exception],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
        tokenization_kwargs: Mapping[str, Any] | None,
        on_error: OnError,
    ) -> list[str]:
        if on_error not in ("raise", "return"):
            raise ValueError(f"on_error must be 'raise' or 'return', got {on_error!r}.")
        params = _per_prompt("sampling_params", sampling_params, len(prompts), SamplingParams)
        priorities = _per_prompt("priority", priority, len(prompts), int)
        prepared = [
            self._prepare(prompt, own, rank or 0, tokenization_kwargs, on_error)
            for prompt, own, rank in zip(prompts, params, priorities, strict=True)
        ]
        for item in prepared:
            if item.request is not None:
                self.llm_engine.add_request(item.request_id, item.request)
        self._queued += prepared
        return [item.request_id for item in prepared]

    def _prepare(
        self,
        prompt: PromptType | Exception,
        params: SamplingParams | None,
        priority: int,
        tokenization_kwargs: Mapping[str, Any] | None,
        on_error: OnError,
    ) -> Prepared:
        request_id = str(next(self._ids))
        own = self.get_default_sampling_params() if params is None else params.clone()
        own.output_kind = RequestOutputKind.FINAL_ONLY
        try:
            if isinstance(prompt, Exception):
                raise prompt
            request = self.llm_engine.make_request(
                request_id, prompt, own, priority=priority, tokenization_kwargs=tokenization_kwargs
            )
        except (TypeError, ValueError) as error:
            if on_error == "raise":
                raise
            return Prepared(request_id, None, RequestOutput.failed(request_id, prompt, str(error)))
        return Prepared(request_id, request)

    def wait_for_completion(self, *, use_tqdm: bool = True) -> list[RequestOutput]:
        """Run until everything queued by this object is done; outputs in the order of queueing.

        When it is interrupted, whatever is still running is aborted.
        """
        queued, self._queued = self._queued, []
        done = {item.request_id: item.failure for item in queued if item.failure is not None}
        waiting = {item.request_id for item in queued} - done.keys()
        bar = _Progress(len(queued), len(done)) if use_tqdm else None
        try:
            while waiting:
                for output in self.llm_engine.step():
                    done[output.request_id] = output
                    waiting.discard(output.request_id)
                    if bar is not None:
                        bar.add(output)
        finally:
            self.llm_engine.abort_request(waiting)
            if bar is not None:
                bar.close()
        return [done[item.request_id] for item in queued]

    def beam_search(
        self,
        prompts: PromptType | Sequence[PromptType],
        params: BeamSearchParams,
        *,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """The `beam_width` best continuations of every prompt, best first; their tokens and text include the prompt.

        Raises:
            TypeError, ValueError: a bad prompt, or `max_logprobs` below twice the beam width.
        """
        return beam_search(
            self.llm_engine, _as_list(prompts), params, use_tqdm=use_tqdm, concurrency_limit=concurrency_limit
        )  # fmt: skip

    def get_tokenizer(self) -> Any:
        """The tokenizer, a `transformers.PreTrainedTokenizerFast`; transformers is loaded with it, not before.

        Raises:
            ValueError: the engine was built with `skip_tokenizer_init=True`.
        """
        if self.llm_engine.tokenizer is None:
            raise ValueError("There is no tokenizer, because skip_tokenizer_init=True.")
        return self.llm_engine.tokenizer.hf

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when it is given no parameters: the model's generation_config.json."""
        return SamplingParams(**self.llm_engine.config.default_sampling)

    def get_metrics(self) -> list[Metric]:
        """A snapshot of the engine's metrics."""
        return self.llm_engine.get_metrics()

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix; False while requests run."""
        return self.llm_engine.reset_prefix_cache()

    def close(self) -> None:
        """Free the device memory; the object is of no use afterwards."""
        self.llm_engine.close()


class _Progress:
    """A bar over requests that also shows input and output tokens per second."""

    def __init__(self, total: int, done: int):
        self._bar = tqdm(total=total, initial=done, desc="Processed prompts", dynamic_ncols=True, unit="prompt")
        self._tokens = [0, 0]

    def add(self, output: RequestOutput) -> None:
        """Count one finished request."""
        self._tokens[0] += len(output.prompt_token_ids)
        self._tokens[1] += sum(len(completion.token_ids) for completion in output.outputs)
        elapsed = max(self._bar.format_dict["elapsed"], 1e-9)
        speeds = [tokens / elapsed for tokens in self._tokens]
        self._bar.set_postfix_str(f"in {speeds[0]:.1f} tok/s, out {speeds[1]:.1f} tok/s", refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def _as_list(prompts: Any) -> list[Any]:
    """A list of prompts from one prompt or several; a list of integers is one prompt of token ids."""
    if isinstance(prompts, str | Mapping):
        return [prompts]  # type: ignore[list-item]
    if not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be a prompt or a list of prompts, got {type(prompts).__name__}.")
    if len(prompts) and not isinstance(prompts[0], str | Mapping | Sequence):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _per_prompt(name: str, value: Any, count: int, kind: type) -> list[Any]:
    """One value a prompt: None and single values are repeated, lists must fit."""
    if value is None or isinstance(value, kind):
        return [value] * count
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be {kind.__name__} or a list of them, got {value!r}.")
    if len(value) != count:
        raise ValueError(
            f"{name} has {len(value)} entries for {count} prompts; give one each, or a single one for all."
        )
    wrong = [index for index, item in enumerate(value) if not isinstance(item, kind)]
    if wrong:
        raise TypeError(f"{name}[{wrong[0]}] must be {kind.__name__}, got {value[wrong[0]]!r}.")
    return list(value)
