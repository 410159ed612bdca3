"""Requests that wait for their grammar, which is compiled in threads of its own."""

from __future__ import annotations

import logging
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from engine.api.errors import RequestRefused
from engine.constraints.contracts import Grammars, Matcher
from engine.core.request_state import RequestState
from engine.failures import NOT_FAILURES

log = logging.getLogger(__name__)

THREADS = 2


class GrammarQueue:
    """Compiles grammars beside the loop.

    The size of a grammar is bounded before it comes here, but compiling it takes time: that must delay neither other
    requests nor the cancellation of its own.
    """

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="grammar")
        self._compiling: dict[RequestState, Future[Matcher]] = {}

    @property
    def num_candidates(self) -> int:
        """How many candidates wait here."""
        return sum(len(state.open) for state in self._compiling)

    def add(self, state: RequestState) -> None:
        """Begin to compile the grammar of a request that has one."""
        grammar = state.request.sampling.grammar
        assert grammar is not None, "only requests with a grammar come here"
        self._compiling[state] = self._threads.submit(self._grammars.build, grammar)

    def take_compiled(self, patience: float) -> list[tuple[RequestState, str]]:
        """The requests whose grammar is done, each with why its grammar cannot be followed, or an empty string.

        Waits up to ``patience`` seconds for one. The candidates of a request without a problem follow its grammar.
        Requests that ended meanwhile are dropped.
        """
        for state in [state for state in self._compiling if state.done]:
            self._compiling.pop(state).cancel()
        if self._compiling and patience:
            wait(self._compiling.values(), patience, FIRST_COMPLETED)
        compiled = []
        for state in [state for state, future in self._compiling.items() if future.done()]:
            problem = ""
            try:
                matcher = self._compiling.pop(state).result()
                for candidate in state.open.values():
                    candidate.constrain(matcher.copy())
            except NOT_FAILURES:
                raise
            except BaseException as error:
                log.warning("request %s has a grammar that cannot be built", state.request.id, exc_info=error)
                problem = str(error) if isinstance(error, RequestRefused) else "grammar cannot be compiled."
            compiled.append((state, problem))
        return compiled

    def close(self) -> None:
        """End the threads. A thread that is compiling ends when it is done: compiling cannot be interrupted."""
        self._threads.shutdown(wait=False, cancel_futures=True)
