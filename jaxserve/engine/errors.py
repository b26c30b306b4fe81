"""What callers of an engine may have to catch; imports nothing heavy."""


class EngineDeadError(RuntimeError):
    """The engine's thread has ended with an error, which is this exception's cause."""
