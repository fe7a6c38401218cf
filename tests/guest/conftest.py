"""Fixtures of the tests with real guests."""

from __future__ import annotations

import pytest

from tests.guest.guest import Image
from tests.guest.initramfs import initramfs
from tests.vm.kernels import KERNELS, boot_files


@pytest.fixture(scope="session")
def image(privilege: None, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Debian 12's kernel with our initramfs. Scope: the whole run."""
    boot = boot_files(KERNELS["6.1"])
    archive = tmp_path_factory.mktemp("guest") / "initramfs"
    archive.write_bytes(initramfs(boot.version, boot.modules))
    return Image(boot.kernel, archive)
