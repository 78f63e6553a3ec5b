"""Prompts of lm-eval's tasks by their parts, and what a plan makes of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from lm_eval.utils import apply_template

from effbench.core.errors import Unsupported
from effbench.core.usage import nearest
from effbench.core.views import Segments
from effbench.nn.infer.memory import Tokens, count_kept, find_lead, remember
from effbench.probes.lm_tasks import load, quiet

if TYPE_CHECKING:
    from effbench.nn.run import ModelRun

ROLES = ("system", "instruction", "contexts", "context", "question")
EvictAt = Literal["prompt", "context"]  # where caches settle: before the prompt's last token, or before the question


@dataclasses.dataclass(frozen=True)
class Ask:
    """A prompt as it is fed."""

    ids: Tokens  # memory may stand in the place of the first
    given: list[int]  # as the task gives it
    hold: int = 1  # last tokens of it that are fed once the cache has settled

    @property
    def shortened(self) -> bool:
        """Whether prompt methods changed it."""
        return not all(isinstance(token, int) for token in self.ids) or [*self.ids] != self.given

    @property
    def kept(self) -> int:
        """Its tokens; those of a memory count."""
        return count_kept(self.ids)


class Asker:
    """Reads prompts of tasks: divides them, has prompt methods rewrite them, and says what is held back.

    `encode` gives the ids of a prompt, and `remember` has memory stand in the place of so many of the first of them. A
    task names the parts of its prompts in `metadata.segments`, each a template of
    a document, or `{field: NAME}` for a field as it is; other prompts are whole. Few-shot examples are contexts.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        rewrite: Callable[[Segments], Segments] | None,
        evict_at: EvictAt = "prompt",
        remember: Callable[[list[int], int], Tokens] | None = None,
    ) -> None:
        self._encode = encode
        self._remember = remember
        self._rewrite = rewrite
        self._evict_at = evict_at
        self._known: dict[tuple[str, str], Ask] = {}
        self.whole: set[str] = set()  # tasks with a prompt that could not be divided, where that counts

    def ask(self, name: str, task: Any, document: Mapping[str, Any], prompt: str) -> Ask:
        """A prompt of a task by its name. Raises `Unsupported` where there is no question that could be held back."""
        if (name, prompt) not in self._known:
            self._known[name, prompt] = self._read(name, task, document, prompt)
        return self._known[name, prompt]

    def _read(self, name: str, task: Any, document: Mapping[str, Any], prompt: str) -> Ask:
        ids = self._encode(prompt)
        if self._rewrite is None and self._remember is None and self._evict_at == "prompt":
            return Ask(ids, ids)
        segments = divide(task, document, prompt)
        if segments.whole:
            self.whole.add(name)
        given = ids
        if self._rewrite is not None:
            segments = self._rewrite(segments)
            ids = self._encode(segments.text())
            ids += given[-1:] if ids[-1:] != given[-1:] else []  # what is scored stands behind the same token
        if self._evict_at == "prompt" and self._remember is None:
            return Ask(ids, given)
        lead = find_lead(self._encode, segments, ids)
        if self._evict_at == "context" and not segments.question:
            raise Unsupported(f"{name}: evict_at=context, and a prompt has no question of its own: see `segments`")
        hold = 1 if self._evict_at == "prompt" else len(ids) - lead
        return Ask(ids if self._remember is None else self._remember(ids, lead), given, hold)


def open_asker(run: ModelRun, encode: Callable[[str], list[int]], evict_at: EvictAt) -> Asker:
    """What reads prompts under the plan of a run, each shortened once for all probes."""

    def shorten(segments: Segments) -> Segments:
        return run.share(("shortened", segments), lambda: run.rewrite(segments))

    rewrite = shorten if run.infer.chain("prompt") else None
    memory = functools.partial(remember, run) if run.infer.slot("memory") is not None else None
    return Asker(encode, rewrite, evict_at, memory)


def divide(task: Any, document: Mapping[str, Any], prompt: str) -> Segments:
    """A prompt of a task by the parts that the task names."""
    templates = (task.config.metadata or {}).get("segments")
    if not isinstance(templates, Mapping):
        return Segments(contexts=(prompt,), whole=True)
    for role in templates:
        if role not in ROLES:
            raise Unsupported(f"{task.config.task}: segments: there is no part {role!r}{nearest(role, ROLES)}")
    named = {role: _render(template, document) for role, template in templates.items()}
    own = str(task.doc_to_text(document))
    front = prompt[: prompt.rfind(own)] if own and own in prompt else ""
    description = str(_render(task.config.description or "", document)).strip()
    delimiter = str(task.config.fewshot_delimiter or "\n\n")
    pieces = [piece.strip() for piece in front.split(delimiter) if piece.strip()]
    if description and pieces and pieces[0].startswith(description):
        named["system"] = description
        pieces[0] = pieces[0].removeprefix(description).strip()
    return Segments.divide(prompt, named, [piece for piece in pieces if piece])


def divided(run: ModelRun, settings: Mapping[str, Any], most: int) -> Iterator[list[Segments]]:
    """The prompts of each task that asks anything, at most `limit` of the settings or `most`, by their parts."""
    for task, items in _list_items(run, settings, most):
        yield [divide(task, document, prompt) for document, prompt in items]


def ask_tasks(run: ModelRun, settings: Mapping[str, Any], most: int) -> Iterator[list[Ask]]:
    """The same as they are fed under the plan of a run."""
    asker = open_asker(run, run.data.encode_prompt, settings.get("evict_at") or "prompt")
    for task, items in _list_items(run, settings, most):
        yield [
            asker.ask(str(task.config.task), task, document, prompt.rstrip()) for document, prompt in items if prompt
        ]


def _list_items(
    run: ModelRun, settings: Mapping[str, Any], most: int
) -> Iterator[tuple[Any, list[tuple[Mapping[str, Any], str]]]]:
    """Tasks, and documents and prompts of their first items; rolling tasks have no prompt."""
    with quiet():
        tasks, failures = load(list(settings.get("tasks") or run.data.tasks), run.data.task_paths)
        if failures:
            raise failures[0]
        for task in tasks["tasks"].values():
            if task.config.output_type == "loglikelihood_rolling":
                continue
            chats: dict[str, Any] = {}
            if settings.get("chat_template"):
                template = functools.partial(run.tokenizer.apply_chat_template, tokenize=False)
                chats = {"apply_chat_template": True, "chat_template": template, "tokenizer_name": "model"}
            task.build_all_requests(limit=settings.get("limit") or most, rank=0, world_size=1, **chats)
            items = {request.doc_id: (request.doc, request.args[0]) for request in task.instances}
            yield task, list(items.values())


def _render(template: Any, document: Mapping[str, Any]) -> Any:
    if isinstance(template, Mapping):
        name = str(template.get("field"))
        if name not in document:
            raise Unsupported(f"segments: {name!r} is no field of a document{nearest(name, document)}")
        return document[name]
    return apply_template(str(template), dict(document))
