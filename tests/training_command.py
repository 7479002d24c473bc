"""What the tests of the commands share."""

from dataclasses import dataclass

# A run of a second.
QUICK = (
    *("--model", "vip_nano4_32", "--device", "cpu", "-j", "0", "-b", "12"),
    *("--epochs", "1", "--warmup-epochs", "0", "--cooldown-epochs", "0"),
)


@dataclass(frozen=True)
class Outcome:
    """What a shell sees of a command."""

    status: int
    out: str
    err: str

    def error(self, program: str) -> str:
        """The one line in which a command says what is wrong; anything else fails."""
        lines = self.err.splitlines()
        beginning = f"{program}: error: "
        assert [line for line in lines if line.startswith(beginning)] == lines[-1:], self.err
        assert "Traceback" not in self.err + self.out
        assert self.status == 2
        return lines[-1].removeprefix(beginning)
