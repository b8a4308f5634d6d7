"""Downloads from a server that fails, and by several processes."""

import os
from dataclasses import replace

import pytest
from fixtures_catalogue import Fault, Server, prepare, prepare_twice_at_once, put, tree_of
from fixtures_sets import make, md5

from recast_pl.data import download
from recast_pl.data.catalogue import CATALOGUE

pytest_plugins = ["fixtures_catalogue"]

# downloads that break


def test_a_cut_download_continues_where_it_stopped(server, publish, tmp_path):
    (path,) = publish("birds")
    server.fail(path, Fault(times=1, cut=20_000))
    assert prepare(tmp_path, "birds") == 0
    assert server.requests == [(path, None), (path, "bytes=20000-")]
    assert tree_of(tmp_path) == make("birds").tree


def test_a_cut_download_of_a_plain_file_is_completed(server, publish, tmp_path):
    paths = publish("svhn")
    server.fail(paths[0], Fault(times=1, cut=100_000))
    assert prepare(tmp_path, "svhn") == 0
    assert server.requests == [(paths[0], None), (paths[0], "bytes=100000-"), (paths[1], None)]
    assert tree_of(tmp_path) == make("svhn").tree


def test_a_download_survives_one_cut_less_than_attempts(server, publish, tmp_path):
    (path,) = publish("birds")
    server.fail(path, Fault(times=download.ATTEMPTS - 1, cut=1_000))
    assert prepare(tmp_path, "birds") == 0
    assert [wanted for _, wanted in server.requests] == [None, *(f"bytes={i}000-" for i in range(1, download.ATTEMPTS))]
    assert tree_of(tmp_path) == make("birds").tree


def test_a_reset_connection_is_tried_again(server, publish, tmp_path):
    (path,) = publish("birds")
    server.fail(path, Fault(times=2, cut=20_000, reset=True))
    assert prepare(tmp_path, "birds") == 0
    assert len(server.requests) == 3
    assert tree_of(tmp_path) == make("birds").tree


def test_the_next_command_continues_a_failed_download(server, publish, tmp_path, refused):
    (path,) = publish("birds")
    server.fail(path, Fault(cut=2_000))
    message = refused("data", "prepare", "birds", "--root", tmp_path)
    part = tmp_path / "CUB_200_2011.tgz.part"
    assert server.url + path in message
    assert f"10,000 bytes are kept in {part}" in message
    assert tree_of(tmp_path) == {part.name: server.files[path][:10_000]}
    server.fail(path)
    server.requests.clear()
    assert prepare(tmp_path, "birds") == 0
    assert server.requests == [(path, "bytes=10000-")]
    assert tree_of(tmp_path) == make("birds").tree


def test_a_server_without_ranges_sends_the_whole_file_again(server, publish, tmp_path):
    (path,) = publish("birds")
    server.fail(path, Fault(times=1, cut=20_000), Fault(ranges=False))
    assert prepare(tmp_path, "birds") == 0
    assert server.requests == [(path, None), (path, "bytes=20000-")]
    assert tree_of(tmp_path) == make("birds").tree


def test_a_part_of_another_file_is_downloaded_again(server, publish, tmp_path):
    (path,) = publish("birds")
    put(tmp_path, {"CUB_200_2011.tgz.part": b"of another file"})
    assert prepare(tmp_path, "birds") == 0
    assert server.requests == [(path, "bytes=15-"), (path, None)]
    assert tree_of(tmp_path) == make("birds").tree


@pytest.mark.parametrize("extra", [0, 7])
def test_a_part_as_long_as_the_file_or_longer_does_not_matter(extra, server, publish, tmp_path):
    (path,) = publish("birds")
    content = server.files[path]
    put(tmp_path, {"CUB_200_2011.tgz.part": content + b"x" * extra})
    assert prepare(tmp_path, "birds") == 0
    assert server.requests[0] == (path, f"bytes={len(content) + extra}-")
    assert len(server.requests) <= 2
    assert tree_of(tmp_path) == make("birds").tree


def test_the_server_need_not_send_the_length(server, publish, tmp_path):
    (path,) = publish("birds")
    server.fail(path, Fault(length=False))
    assert prepare(tmp_path, "birds") == 0
    assert server.requests == [(path, None)]
    assert tree_of(tmp_path) == make("birds").tree


def test_without_a_length_the_checksum_shows_a_cut(server, publish, tmp_path, refused):
    (path,) = publish("birds")
    server.fail(path, Fault(length=False, cut=20_000))
    assert "CUB_200_2011.tgz has checksum" in refused("data", "prepare", "birds", "--root", tmp_path)
    assert tree_of(tmp_path) == {}


@pytest.mark.parametrize(
    "spoil", [lambda content: content[:-100], lambda content: content[::-1]], ids=["short", "other"]
)
def test_a_wrong_checksum_is_refused(spoil, server, publish, tmp_path, refused):
    (path,) = publish("birds")
    wanted = md5(server.files[path])
    server.files[path] = spoil(server.files[path])
    message = refused("data", "prepare", "birds", "--root", tmp_path)
    assert f"CUB_200_2011.tgz has checksum {md5(server.files[path])} rather than the published {wanted}" in message
    assert "try again" in message
    assert server.requests == [(path, None)]
    assert tree_of(tmp_path) == {}


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_missing_file_is_requested_once(status, server, publish, tmp_path, refused):
    (path,) = publish("birds")
    server.fail(path, Fault(status=status))
    message = refused("data", "prepare", "birds", "--root", tmp_path)
    assert f"cannot download {server.url}{path}" in message
    assert f"HTTP {status}" in message
    assert f"put the file at {tmp_path / 'CUB_200_2011.tgz'} yourself" in message
    assert server.requests == [(path, None)]
    assert tree_of(tmp_path) == {}


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_tried_again(status, server, publish, tmp_path):
    (path,) = publish("birds")
    server.fail(path, Fault(times=download.ATTEMPTS - 1, status=status))
    assert prepare(tmp_path, "birds") == 0
    assert server.requests == [(path, None)] * download.ATTEMPTS
    assert tree_of(tmp_path) == make("birds").tree


def test_a_server_that_stays_busy_is_an_error(server, publish, tmp_path, refused):
    (path,) = publish("birds")
    server.fail(path, Fault(status=503))
    message = refused("data", "prepare", "birds", "--root", tmp_path)
    assert server.url + path in message
    assert "503" in message
    assert "run the command again" in message
    assert len(server.requests) == download.ATTEMPTS
    assert tree_of(tmp_path) == {}


def test_the_pauses_between_attempts_double(server, publish, tmp_path, monkeypatch, refused):
    (path,) = publish("birds")
    server.fail(path, Fault(status=503))
    pauses = []
    monkeypatch.setattr(download, "PAUSE", 1.0)
    monkeypatch.setattr(download, "time", type("clock", (), {"sleep": pauses.append}))
    refused("data", "prepare", "birds", "--root", tmp_path)
    assert [pause for pause in pauses if pause] == [1.0, 2.0, 4.0, 8.0]


def test_an_unreachable_server_is_named(publish, tmp_path, refused):
    gone = Server()
    gone.close()
    (path,) = publish("birds")
    row = CATALOGUE["birds"]
    CATALOGUE["birds"] = replace(row, files=(replace(row.files[0], url=gone.url + path),))  # publish restores it
    message = refused("data", "prepare", "birds", "--root", tmp_path)
    assert gone.url + path in message
    assert "refused" in message
    assert tree_of(tmp_path) == {}


def test_files_that_have_arrived_are_kept_when_another_fails(server, publish, tmp_path, refused):
    paths = publish("flowers")
    server.fail(paths[1], Fault(status=404))
    assert server.url + paths[1] in refused("data", "prepare", "flowers", "--root", tmp_path)
    tree = make("flowers").tree
    assert tree_of(tmp_path) == {name: content for name, content in tree.items() if "/jpg/" in name}
    server.fail(paths[1])
    server.requests.clear()
    assert prepare(tmp_path, "flowers") == 0
    assert server.requests == [(path, None) for path in paths[1:]]
    assert tree_of(tmp_path) == tree


def test_a_root_that_is_a_file_is_named(server, publish, tmp_path, refused):
    publish("birds")
    (tmp_path / "root").touch()
    message = refused("data", "prepare", "birds", "--root", tmp_path / "root")
    assert f"cannot write to {tmp_path / 'root'}" in message
    assert server.requests == []


# processes


@pytest.mark.parametrize("name", ["birds", "flowers"])
def test_only_one_of_two_processes_downloads(name, server, publish, tmp_path, capfd):
    paths = publish(name)
    for path in paths:
        server.fail(path, Fault(delay=0.5))
    assert prepare_twice_at_once(name, tmp_path) == [0, 0]
    assert server.requests == [(path, None) for path in paths]
    assert tree_of(tmp_path) == make(name).tree
    assert capfd.readouterr().err.count(f"waiting for another process: preparing {name}") == 1


# permissions


@pytest.mark.parametrize("umask", [0o077, 0o002])
@pytest.mark.parametrize("name", ["birds", "torchvision/MNIST"])
def test_downloads_and_caches_follow_the_umask(name, umask, publish, mnist_server, tmp_path):
    publish("birds")
    before = os.umask(umask)
    try:
        assert prepare(tmp_path / "root", name) == 0
    finally:
        os.umask(before)
    paths = [tmp_path / "root", *(tmp_path / "root").rglob("*")]
    assert any(path.name == "images.npy" for path in paths)
    modes = {path: path.stat().st_mode & 0o777 for path in paths}
    assert modes == {path: (0o777 if path.is_dir() else 0o666) & ~umask for path in paths}
