"""What every refusal on the command line has to be."""


def refused(result: tuple[int, str, str], *says: str) -> None:
    """One line that says all this, exit code 2, and no traceback."""
    code, out, err = result
    assert code == 2, (out, err)
    assert "Traceback" not in out + err
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert [part for part in says if part not in line] == [], line
