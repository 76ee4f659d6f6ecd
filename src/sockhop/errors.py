"""What sockhop tells a user who cannot go on: one sentence, a hint, an exit status."""

__all__ = ["SockhopError", "InputError", "SystemLackError"]


class SockhopError(Exception):
    """A failure that a user can act on.

    *message* says what is wrong, naming the object; *hint* says what would be right
    or what to do about it. The CLI prints both and ends with :attr:`exit_status`.
    """

    exit_status = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class InputError(SockhopError):
    """Usage or input that cannot be accepted (exit status 2)."""

    exit_status = 2


class SystemLackError(SockhopError):
    """The kernel, a permission or the machine's set-up lacks something (exit status 3)."""

    exit_status = 3
