"""Which of a test's parameters `make test` runs; the others are left to `make test-all`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

_Param = type(pytest.param())


def slow_except(ordinary: Sequence[Any], rows: Iterable[Any]) -> list[Any]:
    """Parameters for ``parametrize``, of which all but the ``ordinary`` are marked slow.

    Args:
        ordinary: rows as they are given, or their ids where they are ``pytest.param``.
        rows: values, tuples of values, or ``pytest.param``.

    Raises:
        ValueError: an ordinary one is none of the rows.
    """
    found, rows = [], list(rows)
    known = [row.id if isinstance(row, _Param) else row for row in rows]
    if unknown := [one for one in ordinary if one not in known]:
        raise ValueError(f"{unknown} are none of the parameters {known}")
    for row in rows:
        if isinstance(row, _Param):
            marks = [*row.marks, *[pytest.mark.slow] * (row.id not in ordinary)]
            found.append(pytest.param(*row.values, id=row.id, marks=marks))
        else:
            values = row if isinstance(row, tuple) else (row,)
            found.append(pytest.param(*values, marks=[pytest.mark.slow] * (row not in ordinary)))
    return found
