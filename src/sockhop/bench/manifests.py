"""Manifests of many services, in each form that the agent reads, for `sockhop bench sync`."""

import json
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from sockhop.bench.services import FRONTEND_PORT, service_address

__all__ = ["Change", "FormName", "Manifests", "NETWORKS"]

NETWORKS = ("10.200", "10.201")
"""The /16 networks that backends are in: the last service's are first in one, then in the other."""
_BACKEND_PORT = 8080


class FormName(StrEnum):
    """How services are written down."""

    JSON = "one JSON file"
    YAML = "one YAML file"
    JSON_DIRECTORY = "a directory of JSON files"
    YAML_DIRECTORY = "a directory of YAML files"

    @property
    def is_directory(self) -> bool:
        return self in (FormName.JSON_DIRECTORY, FormName.YAML_DIRECTORY)

    @property
    def suffix(self) -> str:
        return "json" if self in (FormName.JSON, FormName.JSON_DIRECTORY) else "yaml"


class Change(NamedTuple):
    """The renaming that moves the last service's backends to the network with this index."""

    source: Path
    target: Path
    network: int


class Manifests:
    """The services, written below *directory* in one form; each has TCP, the last has UDP too."""

    def __init__(self, directory: Path, form: FormName, services: int, backends: int) -> None:
        self._form = form
        self._services = services
        self._backends = backends
        self._aside = directory / f".aside.{form.suffix}"
        self.path = directory / (form.suffix if form.is_directory else f"all.{form.suffix}")
        self.watched = service_address(services - 1)
        if form.is_directory:
            self.path.mkdir()
            for number in range(services):
                self._file(number).write_text(self._text([self._service(number, 0)]))
        else:
            self.path.write_text(self._text(list(self._all(0))))
        files = list(self.path.iterdir()) if form.is_directory else [self.path]
        self.files = len(files)
        self.bytes = sum(file.stat().st_size for file in files)

    def change(self, network: int) -> Change:
        """Write aside what has to be renamed over."""
        last = self._services - 1
        if self._form.is_directory:
            self._aside.write_text(self._text([self._service(last, network)]))
            return Change(self._aside, self._file(last), network)
        self._aside.write_text(self._text(list(self._all(network))))
        return Change(self._aside, self.path, network)

    def _file(self, number: int) -> Path:
        return self.path / f"service-{number:06}.{self._form.suffix}"

    def _all(self, network: int) -> Iterator[dict[str, Any]]:
        last = self._services - 1
        for number in range(self._services):
            yield self._service(number, network if number == last else 0)

    def _service(self, number: int, network: int) -> dict[str, Any]:
        protocols = "tcp+udp" if number == self._services - 1 else "tcp"
        first = number * self._backends + 2
        addresses = [
            f"{NETWORKS[network]}.{n >> 8 & 255}.{n & 255}:{_BACKEND_PORT + (n >> 16)}"
            for n in range(first, first + self._backends)
        ]
        return {
            "name": f"service-{number:06}",
            "frontends": [f"{service_address(number)}:{FRONTEND_PORT}/{protocols}"],
            "backends": addresses,
        }

    def _text(self, services: list[dict[str, Any]]) -> str:
        if self._form.suffix == "json":
            return json.dumps({"version": 1, "services": services})
        return "version: 1\nservices:\n" + "".join(map(_yaml, services))


def _yaml(service: dict[str, Any]) -> str:
    """Write a service as a person would: a list to a line."""
    return (
        f"  - name: {service['name']}\n"
        f"    frontends: {json.dumps(service['frontends'])}\n"
        f"    backends: {json.dumps(service['backends'])}\n"
    )
