"""What an engine raises on purpose.

EngineError
├── RequestRefused      the request can never be served; the message names the value and the limit
├── Overloaded          the queue is full
├── EngineUnavailable   loading, died, or closing
├── OutOfMemory         a step did not fit; the message has the numbers and is for the client
├── ModelRefused        the model cannot be served; the message names the layer and the reason
└── SourceError         the weights cannot be obtained or used
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of everything that the engine raises on purpose."""


class RequestRefused(EngineError):
    """The request can never be served as it is."""


class Overloaded(EngineError):
    """The queue is full; the same request may succeed later."""


class EngineUnavailable(EngineError):
    """No engine can take the request now."""


class OutOfMemory(EngineError):
    """The memory does not hold the step of one request; the message has the numbers."""


class ModelRefused(EngineError):
    """The model in the folder cannot be served; the message names what is in the way."""


class SourceError(EngineError):
    """The weights cannot be obtained or used; the message is one sentence that says what to do."""
