"""Errors whose message is one sentence for the user: what is wrong, where, and how to mend it.

Commands print the sentence and end with status 1. Anything else that is raised is a fault of this project's.
"""


class MSAError(Exception):
    """The base of all of them."""


class ConfigError(MSAError, ValueError):
    """A setting, a flag or a machine that cannot work; the message names the field and the remedy."""


class DataError(MSAError, ValueError):
    """Bad documents, questions or recordings, or a request that they cannot meet."""


class CheckpointError(MSAError, ValueError):
    """A checkpoint that is missing, unreadable or another model's; the message names all that is at fault."""


class BankError(MSAError, ValueError):
    """A bank on disk that cannot be used or read, or a request it cannot meet."""


class QuestionError(MSAError, ValueError):
    """A question that cannot be asked."""


class TrainingDiverged(MSAError, RuntimeError):
    """The loss is no longer a number; the message names the step."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError` with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)
