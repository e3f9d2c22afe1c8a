"""The errors that a user can cause and mend; each message names the value, what was expected, and the remedy."""


class WorkbenchError(Exception):
    """Base of every error that the workbench raises on purpose."""


class ModelError(WorkbenchError):
    """A model could not be found, fetched, read or trusted."""


class UnsupportedModelError(ModelError):
    """An analysis needs the fast path and the model was refused on it; the message carries the reason."""


class PromptError(WorkbenchError):
    """Prompts, answers or tokens do not fit together."""


class DataError(WorkbenchError):
    """A data file, table or cache is missing, damaged or foreign."""


class OutputError(WorkbenchError):
    """A result could not be written."""


class BudgetError(WorkbenchError):
    """The work asked for does not fit in the memory budget."""
