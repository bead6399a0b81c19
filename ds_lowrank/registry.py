"""Methods by name: those of the package, imported when they are asked for, and a user's own."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

from ds_lowrank.states.layout import declare

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes by name.

    Args:
        option: the configuration's option that names them.
        own: name -> module of the package's own.
        papers: names that papers have for some of them, for the error where one of these is asked for.
    """

    def __init__(self, option: str, own: dict[str, str], papers: str = ""):
        self._option = option
        self._own = own
        self._papers = papers
        self._classes: dict[str, type[T]] = {}

    def register(self, cls: type[T]) -> type[T]:
        """Make a class known by its ``name``; a decorator.

        Raises:
            ValueError: the name is taken, or it declares a slot in another way than the method that has it.
        """
        name = getattr(cls, "name", None)
        if not isinstance(name, str) or not name:
            raise ValueError(f"{cls.__name__} needs a class attribute 'name', by which {self._option} asks for it")
        known = self._classes.get(name)
        origin = (cls.__module__, cls.__qualname__)
        if (known is not None and (known.__module__, known.__qualname__) != origin) or (
            name in self._own and self._own[name] != cls.__module__
        ):
            raise ValueError(f"there is a {self._option} {name!r} already: give {cls.__name__} another name")
        declare(getattr(cls, "slots", ()))
        self._classes[name] = cls
        return cls

    def names(self) -> tuple[str, ...]:
        """All that may be asked for."""
        return (*self._own, *(name for name in self._classes if name not in self._own))

    def make(self, name: str) -> T:
        """The method of a name.

        Raises:
            ValueError: there is none.
        """
        if name not in self.names():
            near = difflib.get_close_matches(str(name), self.names(), n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            papers = f" ({self._papers})" if self._papers else ""
            raise ValueError(
                f"lowrank.{self._option} must be one of {', '.join(self.names())}{papers}, got {name!r}{hint} One of "
                "your own is known once its file is imported: --import FILE.py on command lines, import in a program"
            )
        if name not in self._classes:
            importlib.import_module(self._own[name])
        return self._classes[name]()

    def load(self) -> None:
        """Import all of the package's own: what they keep is known then."""
        for module in dict.fromkeys(self._own.values()):
            importlib.import_module(module)

    def __contains__(self, name: Any) -> bool:
        return name in self.names()


def import_methods(sources: Iterable[str]) -> None:
    """Import what registers a user's own rules and selections. Every rank has to, before it makes a configuration.

    Args:
        sources: paths of Python files, which end in ``.py``, or names of modules. A file is imported once.

    Raises:
        ValueError: a file does not exist, a module is not found, or what they register is refused.
    """
    for source in sources:
        if not source.endswith(".py"):
            try:
                importlib.import_module(source)
            except ModuleNotFoundError as error:
                raise ValueError(f"--import {source}: {error}; a file is named with its .py") from error
            continue
        path = Path(source).resolve()
        if not path.is_file():
            raise ValueError(f"--import {source}: no such file")
        name = f"ds_lowrank_methods_{path.stem}"
        loaded = sys.modules.get(name)
        if loaded is not None and loaded.__file__ == str(path):
            continue
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
