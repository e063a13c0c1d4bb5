"""A private host of libvirt's test driver for each test: logic and schema, no guests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vmctl.config import Folders, Settings
from vmctl.hosts import Host
from vmctl.hypervisor.connection import Connection, connect

NODE = """\
<node>
  <network><name>vmctl</name><bridge name="vb0"/><ip address="10.9.0.1" netmask="255.255.255.0"><dhcp>
    <range start="10.9.0.10" end="10.9.0.200"/></dhcp></ip></network>
  <pool type="dir"><name>vmctl</name><uuid>35bb2ad9-388a-cdfe-461a-b8907f6e53fe</uuid>
    <target><path>/vmctl</path></target></pool>
  <pool type="dir"><name>vmctl-images</name><uuid>35bb2ad9-388a-cdfe-461a-b8907f6e53ff</uuid>
    <target><path>/vmctl-images</path></target></pool>
</node>
"""


@pytest.fixture
def conn(tmp_path: Path) -> Iterator[Connection]:
    """A connection to a test driver of this test's own."""
    node = tmp_path / "node.xml"
    node.write_text(NODE)
    with connect(f"test://{node}") as opened:
        yield opened


@pytest.fixture
def host(conn: Connection, tmp_path: Path) -> Host:
    """A host around that connection with folders of this test's own."""
    return Host(conn, Settings(), Folders(tmp_path, tmp_path, tmp_path, tmp_path))


@pytest.fixture
def folder(host: Host, tmp_path: Path) -> Path:
    """That of a pool."""
    folder = tmp_path / "disks"
    folder.mkdir()
    host.conn.handle.storagePoolCreateXML(
        f"<pool type='dir'><name>disks</name><target><path>{folder}</path></target></pool>"
    )
    return folder
