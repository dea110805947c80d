# SPDX-License-Identifier: Apache-2.0
"""A device on paper: it runs the plans of a scheduler and sees whether every row reads its own.

A slot of a page holds (position, token), a state holds the tokens that it was made from. The model
is a rule from the latest tokens to the next, so that every answer has one right text.
"""

VOCABULARY = 5


def next_token(tokens):
    """The one continuation of these tokens."""
    return (3 * sum(tokens[-3:]) + len(tokens) * len(tokens) + tokens[0]) % VOCABULARY


def right_answer(request):
    """The answer to a request that is alone in the world."""
    tokens = request.tokens[: request.prompt_len].tolist()
    for _ in range(request.max_new_tokens):
        token = next_token(tokens)
        if token in request.stop_tokens:
            break
        tokens.append(token)
    return tokens[request.prompt_len :]


class PaperDevice:
    """`careful`: it accepts no draft behind a stop token."""

    def __init__(self, pages):
        self.geometry, self.careful = pages, True
        self.erase()

    def erase(self):
        count = self.geometry.shards * self.geometry.pages_per_shard
        self.pages = [[None] * self.geometry.page_size for _ in range(count)]
        self.states = [None] * self.geometry.states.size
        self.latest = {}

    def run(self, plan, right=lambda row: 0, rows=None):
        """Run the first `rows` rows of a plan; the sampled tokens of each.

        Args:
          right: how many of a row's drafts are what the model says.
        """
        for page, block in plan.pages_out:
            block.content = list(self.pages[page])
        for state, block in plan.states_out:
            block.content = self.states[state]
        for source, target in plan.page_copies:
            self.pages[target] = list(self.pages[source])
        for source, target in plan.state_copies:
            self.states[target] = self.states[source]
        for block, page in plan.pages_in:
            self.pages[page] = list(block.content)
        for block, state in plan.states_in:
            self.states[state] = block.content
        return [self._run_row(row, right(row)) for row in plan.rows[:rows]]

    def reads(self, table, tokens):
        """Assert that the pages of a table hold these tokens from position 0 on."""
        size = self.geometry.page_size
        for position, token in enumerate(tokens):
            place = position // size
            assert table[place] // self.geometry.pages_per_shard == place % self.geometry.shards
            got = self.pages[table[place]][position % size]
            assert got == (position, token), f"position {position}: {got}, not token {token}"

    def has(self, store):
        """Assert that blocks of the host hold the tokens that they are found by."""
        for block in store.blocks():
            run = memoryview(block.run).cast("i").tolist()
            if block.content is None:  # the plan that fills it has not run
                continue
            if block.shelf is store.states:
                assert block.content[-len(run) :] == run, "the state of other tokens"
            else:
                slots = block.content[: len(run)]
                first = slots[0][0]
                assert first % self.geometry.page_size == 0
                assert slots == list(enumerate(run, first)), "other tokens"

    def _run_row(self, row, right):
        before = row.request.tokens[: row.start].tolist()
        self.reads(row.seat.table, before)
        if self.states and row.start:
            assert self.states[row.seat.state] == before, "the state of other tokens"
        given = row.request.tokens[row.start : row.start + row.count - row.drafts]
        given = given or [self.latest[row.seat]]  # sampled by a step that is not read yet
        if given[0] in row.request.stop_tokens and row.start >= row.request.prompt_len:
            return [0]
        tokens, sampled = [*before, *given], []
        for number in range(row.drafts):
            said = next_token(tokens)
            tokens.append(said if number < right else (said + 1) % VOCABULARY)
        self._write(row.seat.table, row.start, tokens[row.start :])
        accepted = [*before, *given]
        if row.samples:
            sampled.append(next_token(accepted))
            while len(accepted) < len(tokens) and tokens[len(accepted)] == sampled[-1]:
                if self.careful and sampled[-1] in row.request.stop_tokens:
                    break
                accepted.append(sampled[-1])
                sampled.append(next_token(accepted))
            self.latest[row.seat] = sampled[-1]
        if self.states:
            self.states[row.seat.state] = accepted
        if row.snapshot is not None:
            self.states[row.snapshot] = accepted
        return sampled

    def _write(self, table, start, tokens):
        size = self.geometry.page_size
        for position, token in enumerate(tokens, start):
            self.pages[table[position // size]][position % size] = (position, token)
