"""Tickets in a plan: searches side by side whose masks are combined, and what each ticket is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from orchestrator.errors import PlanError
from orchestrator.ops import Combine, Control, Init, Prune, Rewind, Transfer
from orchestrator.plan import Compared, Ticket
from orchestrator.planning import sharing
from orchestrator.planning.builder import Builder
from orchestrator.planning.pruning import prune_ops, refuse_empty, tensor_factors
from orchestrator.seeds import derive
from orchestrator.settings import Settings

OTHER_INIT = ("reinitialised", "sign-kept", "sign-constant")
"""The controls that start from the weights of another init."""


def consensus(builder: Builder, settings: Settings, prunes: Sequence[Prune], ancestor: str) -> list[tuple[int, str]]:
    """Searches from one init, side by side; their masks combined to a ticket over the ancestor; the ticket trained.

    Args:
        builder: of the plan.
        settings: of the proposal; it says what differs between the searches.
        prunes: of one search, round by round.
        ancestor: the state whose weights the ticket starts from.
    """
    choices = settings.choices
    if choices.vary == "tasks":
        common = sharing.body(builder.info, settings.tickets.tasks[: choices.searches - 1])
        settings = sharing.protecting(settings, builder.info, common)
        prunes = prune_ops(settings, builder.info, seed=builder.seed, count=len(prunes))
    masks = [_search(builder, settings, prunes, ancestor, number) for number in range(choices.searches)]
    votes = settings.tickets.weights if choices.rule == "weighted" else (1,) * len(masks)
    ordered = sorted(zip(masks, votes, strict=True))  # the same searches in another order are the same ticket
    combined = builder.add(
        Combine(
            rule=choices.rule,
            least=choices.at_least,
            weights=tuple(float(vote) for _, vote in ordered) if choices.rule == "weighted" else (),
            sparsity=choices.ticket_sparsity,
            seed=builder.seed if choices.rule == "most-voted" else 0,
        ),
        [*(mask for mask, _ in ordered), ancestor],
        stored=True,
        resumable=True,  # rewound late, the ticket goes on with the ancestor's optimizer, as its controls do
    )
    trained = builder.show(builder.train_on(combined, to=builder.end))
    compare(builder, settings, len(prunes), combined, trained, ancestor, searches=masks)
    return [(len(prunes), trained)]


def compare(
    builder: Builder,
    settings: Settings,
    number: int,
    start: str,
    trained: str,
    ancestor: str,
    *,
    searches: Sequence[str] = (),
) -> None:
    """Note a ticket and run its controls, if the study wants those of this round.

    Args:
        builder: of the plan.
        settings: of the proposal; `[tickets]` names the controls.
        number: the round.
        start: the ticket: the state under its mask that it is trained from.
        trained: the same, trained.
        ancestor: the dense state whose weights it starts from.
        searches: the pruned states that it was combined from.
    """
    controls: list[Compared] = []
    if is_compared(settings, number):
        for kind in settings.tickets.kinds:
            controls += compared(builder, settings, kind, number, start, trained, ancestor, searches)
    builder.tickets.append(
        Ticket(
            round=number,
            key=trained,
            start=start,
            ancestor=ancestor,
            rule=settings.choices.rule if searches else "",
            searches=tuple(searches),
            depth=builder.depths[start],
            trainings=_trainings(builder, start),
            controls=tuple(controls),
        )
    )


def is_compared(settings: Settings, number: int) -> bool:
    """Whether the tickets of this round are compared with anything."""
    wanted = settings.tickets.rounds
    return number in wanted or (not wanted and number == settings.choices.rounds)


def _search(builder: Builder, settings: Settings, prunes: Sequence[Prune], ancestor: str, number: int) -> str:
    """One search's last pruned state. The first search trains as the dense model does, so that they share it."""
    choices = settings.choices
    if choices.vary == "tasks" and number:
        return _search_elsewhere(builder, settings, len(prunes), ancestor, number)
    how: dict[str, Any] = {}
    if choices.vary == "order" and number:
        how = {"order_seed": derive(builder.seed, "search", number)}
    elif choices.vary == "data":
        how = {"share": choices.data_share, "share_seed": derive(builder.seed, "share", number)}
    elif choices.vary == "criterion":
        mine = choices.model_copy(update={"criterion": settings.tickets.criteria[number]})
        searching = replace(settings, choices=mine, criterion_parameters={}, criterion_code="")
        prunes = prune_ops(searching, builder.info, seed=builder.seed, count=len(prunes))
    return _rounds(builder, prunes, ancestor if how else builder.init(), ancestor, how)


def _search_elsewhere(builder: Builder, settings: Settings, rounds: int, ancestor: str, number: int) -> str:
    """A search on another task, whose model starts from the ancestor's weights wherever it has the same tensors.

    Only the tensors that all tasks share are pruned; the others are that task's own, dense.
    """
    tasks = settings.tickets.tasks[: settings.choices.searches - 1]
    task = tasks[number - 1]
    common = sharing.body(builder.info, tasks)
    there = builder.on(task.label)
    with sharing.naming(task.label):
        searching = sharing.protecting(settings, there.info, common)
        prunes = prune_ops(searching, there.info, seed=builder.seed, count=rounds)
        refuse_empty(searching, prunes, there.info)
        start = there.add(Transfer(leave=task.leave), [ancestor, there.init()])
        return _rounds(there, prunes, start, start, {})


def _rounds(builder: Builder, prunes: Sequence[Prune], start: str, ancestor: str, how: Mapping[str, Any]) -> str:
    """Trained from `start`, pruned, and trained again from the ancestor after each pruning but the last."""
    state = builder.train_on(start, to=builder.end, **how)
    for place, op in enumerate(prunes, start=1):
        state = builder.prune(op, state)
        if place < len(prunes):
            rewound = builder.add(Rewind(what="weights"), [state, ancestor])
            state = builder.train_on(rewound, to=builder.end, **how)
    builder.store(state)
    return state


def compared(
    builder: Builder,
    settings: Settings,
    kind: str,
    number: int,
    start: str,
    trained: str,
    ancestor: str,
    searches: Sequence[str] = (),
) -> Iterator[Compared]:
    """The trained states of one kind of control."""
    if kind == "dense":
        yield Compared(kind=kind, key=builder.dense())
    elif kind == "dense-long":
        long = builder.train_on(builder.init(), to=builder.end * (builder.depths[start] + 1))
        yield Compared(kind=kind, key=builder.show(long))
    elif kind == "one-shot":
        pruned = builder.prune(_like(settings, builder), builder.dense(), reference=start)
        yield Compared(kind=kind, key=builder.show(_retrained(builder, pruned, ancestor)))
    elif kind == "imp":
        if searches:  # elsewhere the ticket itself was found so
            yield Compared(kind=kind, key=imp(builder, settings, number * len(searches), start, ancestor))
    elif kind == "sibling":
        yield from _siblings(builder, settings, start, trained, ancestor)
    else:
        for draw in range(settings.tickets.draws):
            seed = derive(builder.seed, "reinit" if kind in OTHER_INIT else f"control/{kind}", draw)
            made = _controlled(builder, kind, seed, start, ancestor)
            yield Compared(kind=kind, draw=draw, key=builder.show(builder.train_on(made, to=builder.end)))


def _controlled(builder: Builder, kind: str, seed: int, start: str, ancestor: str) -> str:
    """A control before its training."""
    parents = [start, ancestor]
    if kind in OTHER_INIT:
        if not builder.info.init_varies:
            raise PlanError(
                f"control {kind!r} needs new weights, but model() gives the same ones under every seed; "
                "legal with it: a Task with fresh, the untrained builder"
            )
        parents.append(builder.add(Init(seed=seed, fresh=builder.info.comes_trained), []))
    return builder.add(Control(kind=kind, seed=seed), parents)


def _siblings(builder: Builder, settings: Settings, start: str, trained: str, ancestor: str) -> Iterator[Compared]:
    """The ticket, the dense model and the reinitialised ticket, each trained once more in another order of the data.

    The dense sibling leaves the dense run at the ancestor, where the ticket starts. What is trained only to stand
    beside its sibling is of the kind "sibling/first".
    """
    for draw in range(settings.tickets.draws):
        pairs = {"ticket": (start, trained), "dense": (ancestor, builder.dense())}
        if builder.info.init_varies:
            other = _controlled(builder, "reinitialised", derive(builder.seed, "reinit", draw), start, ancestor)
            pairs["reinitialised"] = (other, builder.show(builder.train_on(other, to=builder.end)))
        for of, (begin, beside) in pairs.items():
            again = builder.train_on(begin, to=builder.end, order_seed=derive(builder.seed, "sibling", draw))
            yield Compared(kind=f"sibling/{of}", draw=draw, key=builder.show(again), beside=beside)
            if beside != trained:
                yield Compared(kind="sibling/first", draw=draw, key=beside)


def imp(builder: Builder, settings: Settings, rounds: int, start: str, ancestor: str) -> str:
    """Iterative magnitude pruning to the ticket's own counts, in equal rates.

    In as many rounds as would lead there if the searches agreed by chance alone.
    """
    state = builder.dense()
    op = _like(settings, builder)
    for place in range(1, rounds + 1):
        pruned = builder.prune(replace(op, part=round(place / rounds, 12)), state, reference=start)
        state = _retrained(builder, pruned, ancestor)
    return builder.show(state)


def _like(settings: Settings, builder: Builder) -> Prune:
    """Magnitude pruning to a ticket's counts: overall where its search ranks all layers together, else in each layer.

    So that nothing differs from the ticket but how its mask was found.
    """
    together = settings.choices.scope == "global"
    protected = [(name, factor) for name, factor in tensor_factors(settings, builder.info).items() if factor == 0]
    return Prune(
        criterion="magnitude",
        scope="global" if together else "layer",
        like="overall" if together else "layers",
        factors=tuple(sorted(protected)) if together else (),
        floor=settings.prune.floor if together else 0,
    )


def _retrained(builder: Builder, pruned: str, ancestor: str) -> str:
    return builder.train_on(builder.add(Rewind(what="weights"), [pruned, ancestor]), to=builder.end)


def _trainings(builder: Builder, key: str) -> int:
    """How many trainings in all led to a state."""
    seen: set[str] = set()
    stack = [key]
    while stack:
        node = builder.nodes[stack.pop()]
        if node.key not in seen:
            seen.add(node.key)
            stack += node.parents
    return sum(builder.trains_to_the_end(key) for key in seen)
