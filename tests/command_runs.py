"""`prime-v2` in this process."""

from typer.testing import CliRunner

from prime_v2.commands.main import app


def run(*arguments: object):
    """The result of a command."""
    return CliRunner().invoke(app, [str(each) for each in arguments])


def refused(*arguments: object) -> str:
    """The sentence of a refusal, which must be all that it prints."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    start = f"prime-v2 {arguments[0]}: error: "
    assert lines[0].startswith(start)
    return lines[0].removeprefix(start)
