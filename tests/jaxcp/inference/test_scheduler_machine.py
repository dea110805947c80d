# SPDX-License-Identifier: Apache-2.0
"""Whatever happens to a scheduler and in whatever order: nothing is lost, shared wrongly, or stuck.

Hypothesis plays requests, steps, cancellations and faults against pools that are nearly too small;
`PaperDevice` sees what each row reads, and each answer is compared with the one right text.
"""

import random
from collections import deque

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from paper_device import VOCABULARY, PaperDevice, right_answer

from jaxcp.inference.limits import ChunkLimits, HostLimits, Limits, TogetherLimits
from jaxcp.inference.pages import Pages
from jaxcp.inference.request import Request, Status
from jaxcp.inference.scheduler import Scheduler

SEEDS = st.integers(0, 2**32 - 1)


class Machine(RuleBasedStateMachine):
    events = restored = together = 0

    @initialize(seed=SEEDS)
    def start(self, seed):
        draw = random.Random(seed)
        self.pages = Pages(
            shards=draw.choice([1, 1, 3, 8]),
            pages_per_shard=draw.randint(1, 6),
            page_size=draw.randint(1, 4),
            states=draw.choice([0, 0, 1, 3, 5, 9]),
        )
        self.limits = Limits(
            max_rows=draw.randint(1, 4),
            max_len=50,
            chunks=ChunkLimits(
                sizes=draw.choice([(1,), (4, 8), (3, 16, 64)]),
                seconds=lambda tokens, context: tokens * (1 + context / 16),
                max_wait=draw.choice([1.0, 12.0]),
                together=self.program_for_several(draw),
            ),
            overcommit=draw.choice([1.0, 4.0]),
            snapshot_pages=draw.randint(1, 4),
            host=self.room_on_the_host(draw),
        )
        self.scheduler = Scheduler(self.pages, self.limits)
        self.device = PaperDevice(self.pages)
        self.device.careful = draw.random() < 0.7
        self.requests, self.in_flight, self.now = [], deque(), 0.0
        self.stopped = set()

    def program_for_several(self, draw):
        """None, or one of three lines, at a price that is sometimes too high."""
        price = draw.choice([None, 0.0, 0.0, 2.0, 9.0])
        sizes = {"rows": 3, "tokens": draw.choice([2, 5]), "context": draw.choice([9, 50])}
        if price is None:
            return None
        return TogetherLimits(**sizes, seconds=lambda contexts: price + sum(contexts) / 16)

    def room_on_the_host(self, draw):
        """None, a block or two, or enough for all; at a price that is sometimes too high."""
        size = draw.choice([None, 5, 12, 40, 1000])
        price = draw.choice([0.0, 0.0, 4.0, 40.0])
        return size and HostLimits(
            size=size, page_bytes=3, state_bytes=2, seconds=lambda pages, states: price * pages
        )

    @rule(seed=SEEDS)
    def ask(self, seed):
        draw = random.Random(seed)
        for _ in range(draw.choice([1, 1, 3])):
            self.add(draw, draw.choices(range(2), k=draw.randint(1, 20)))

    @precondition(lambda self: self.requests)
    @rule(seed=SEEDS)
    def go_on(self, seed):
        """The next turn of a conversation, or a fork of one: its history and some more."""
        draw = random.Random(seed)
        history = draw.choice(self.requests).tokens.tolist()
        for _ in range(draw.randint(1, 2)):
            self.add(draw, history + draw.choices(range(VOCABULARY), k=draw.randint(0, 5)))

    @precondition(lambda self: self.requests)
    @rule(seed=SEEDS)
    def ask_again(self, seed):
        """Other answers of a prompt, which wait until it is computed."""
        draw = random.Random(seed)
        first = draw.choice(self.requests)
        for _ in range(draw.randint(1, 3)):
            self.add(draw, first.tokens[: first.prompt_len].tolist(), after=first)

    @precondition(lambda self: self.requests)
    @rule(seed=SEEDS)
    def edit(self, seed):
        draw = random.Random(seed)
        history = draw.choice(self.requests).tokens.tolist()
        kept = history[: draw.randint(0, len(history))]
        self.add(draw, kept + draw.choices(range(VOCABULARY), k=draw.randint(1, 6)))

    @rule(seed=SEEDS, late=st.sampled_from([0, 0, 1, 1, 2]))
    def step(self, seed, late):
        """A step whose tokens are read at once, or only when later ones are on their way."""
        self.dispatch(random.Random(seed))
        while len(self.in_flight) > late:
            self.read()

    @precondition(lambda self: self.requests)
    @rule(seed=SEEDS)
    def cancel(self, seed):
        self.scheduler.cancel(random.Random(seed).choice(self.requests), self.now)

    @precondition(lambda self: self.scheduler.running)
    @rule(seed=SEEDS)
    def stop_early(self, seed):
        draw = random.Random(seed)
        request = draw.choice(self.scheduler.running)
        self.stopped.add(request)
        self.scheduler.finish(request, draw.randint(0, len(request.answer)), self.now)

    @rule(seed=SEEDS)
    def fail(self, seed):
        """A step raises before its copies, or after some of its rows."""
        while self.in_flight:
            self.read()
        plan = self.schedule(random.Random(seed))
        if plan.rows:
            if seed % 2:
                self.device.run(plan, rows=seed % (1 + len(plan.rows)))
            self.scheduler.fail(plan, RuntimeError("out of luck"), self.now)
            assert all(row.request.status is Status.FAILED for row in plan.rows)

    @precondition(lambda self: self.scheduler.running)
    @rule()
    def lose_the_device(self):
        while self.in_flight:
            self.read()
        self.scheduler.forget()
        self.device.erase()

    @rule(seed=SEEDS)
    def evict(self, seed):
        if seed % 2:
            self.scheduler.tree.clear()
        self.scheduler.tree.evict_state()

    @invariant()
    def after_each_event(self):
        Machine.events += 1
        self.adds_up()

    def adds_up(self):
        self.scheduler.check()
        for path, pages, state in paths(self.scheduler.tree.root):
            self.device.reads(pages, path)
            assert state is None or self.device.states[state] == path
        if self.limits.host:
            self.device.has(self.scheduler.tree.host)
        for request in self.requests:
            if request.status is Status.FINISHED and request not in self.stopped:
                assert request.answer == right_answer(request)

    def teardown(self):
        """Whatever came in, and in whatever order: all of it comes to its end."""
        draw = random.Random(0)
        for _ in range(100 + 3 * sum(request.max_computed for request in self.requests)):
            if all(request.done for request in self.requests):
                break
            self.dispatch(draw)
            self.adds_up()
            while len(self.in_flight) > draw.randint(0, 2):
                self.read()
            self.adds_up()
        assert all(request.done for request in self.requests), "somebody waits for ever"
        Machine.restored += sum(request.stats.restored for request in self.requests)
        while self.in_flight:
            self.read()
        self.scheduler.tree.clear()
        self.adds_up()
        assert all(pool.free == pool.size for pool in (*self.pages.pools, self.pages.states))

    def add(self, draw, prompt, **options):
        request = Request(
            prompt,
            max_new_tokens=draw.randint(1, 12),
            stop_tokens=draw.choice([(), (), (4,), (3, 4)]),
            in_turn=draw.random() < 0.2,
            **options,
        )
        most = len(prompt) + request.max_new_tokens - 1
        places = -(-most // self.pages.page_size)
        fits = most <= 50 and -(-places // self.pages.shards) <= self.pages.pages_per_shard
        try:
            self.scheduler.add(request, self.now)
        except ValueError:
            assert not fits
        else:
            assert fits
            self.requests.append(request)

    def shares_one_program(self, rows):
        """These rows fit into it, and none of them decodes."""
        together = self.limits.chunks.together
        Machine.together += len(rows) > 1
        for row in rows:
            assert row.count <= together.tokens and row.start + row.count <= together.context
            assert row.start + row.count <= len(row.request.tokens) and not row.drafts
        assert not rows or len(rows) <= together.rows

    def schedule(self, draw):
        self.now += 1
        oldest, preempted = self.scheduler.running[:1], self.preempted()
        most = draw.randint(0, 3)
        plan = self.scheduler.schedule(self.now, lambda request: most)
        assert self.scheduler.running[: len(oldest)] == oldest, "the oldest was preempted"
        planned = {row.request for row in plan.rows}
        self.shares_one_program([row for row in plan.rows if row.together])
        for request in self.scheduler.running:
            left = len(request.tokens) - (request.seat.scheduled - (request in planned))
            assert left > 1 or request in planned or self.in_flight, "a row did not decode"
        if not self.in_flight and (self.scheduler.running or self.scheduler.waiting):
            assert plan.rows, "nothing goes on"
        assert self.limits.overcommit > 1 or self.preempted() == preempted
        return plan

    def preempted(self):
        return sum(request.stats.preempted for request in self.requests)

    def dispatch(self, draw):
        plan = self.schedule(draw)
        if plan.rows:
            right = draw.randint(0, 3)
            self.in_flight.append((plan, self.device.run(plan, lambda row: right)))
        elif self.in_flight:
            self.read()

    def read(self):
        plan, sampled = self.in_flight.popleft()
        self.scheduler.advance(plan, sampled, self.now)


def paths(node, path=(), pages=()):
    """Every sequence in the tree that ends with a node: (tokens, pages, snapshot)."""
    path, pages = [*path, *node.tokens], [*pages, *node.pages]
    for child in node.children.values():
        yield from paths(child, path, pages)
    if not node.children or node.state is not None:
        state = node.state
        while node.children:  # its last page, if it ends inside one, is any child's
            node = next(iter(node.children.values()))
            pages += node.pages
        yield path, pages, state


@pytest.mark.parametrize("events", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_events(events):
    Machine.events = 0
    options = settings(
        max_examples=events // 30,
        stateful_step_count=50,
        phases=[Phase.generate],  # seeds do not shrink, and trying takes minutes
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Machine, settings=options)
    assert Machine.events >= events


def test_what_is_played_happens():
    """Pages come back from the host, and prompts share programs, in machines of equal chances."""
    Machine.restored = Machine.together = 0
    for seed in range(20):
        draw, machine = random.Random(seed), Machine()
        machine.start(seed)
        for _ in range(40):
            rules = [*[machine.ask] * 4, machine.step, machine.step]
            rules += [machine.go_on, machine.edit, machine.cancel] if machine.requests else []
            name = draw.choice(rules)
            late = {"late": draw.randint(0, 2)} if name == machine.step else {}
            name(seed=draw.randrange(2**32), **late)
            machine.after_each_event()
        machine.teardown()
    assert Machine.restored > 10 and Machine.together > 10
