"""Archives: damaged, wrong and malicious ones are refused and leave nothing."""

import gzip
import io
import re
import stat
import tarfile
import zipfile
from dataclasses import replace

import pytest
from fixtures_catalogue import prepare, put, tree_of
from fixtures_sets import archive, make

from recast_pl.data.catalogue import CATALOGUE
from recast_pl.data.download import extract
from recast_pl.errors import DataError

pytest_plugins = ["fixtures_catalogue"]

# damaged and wrong archives


def members_end(tar, count):
    """The position in a plain tar file at which its first members end."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as file:
        return file.getmembers()[count].offset


@pytest.mark.parametrize("cut", ["gzip", "tar"])
def test_a_truncated_archive_is_refused(cut, publish, tmp_path, refused):
    if cut == "gzip":
        name, file = "aircraft", "fgvc-aircraft-2013b.tar.gz"
        publish(name, **{"fgvc-aircraft-2013b": make(name).downloads[file][:-1000]})
    else:
        name, file = "scenes", "indoor-67/indoorCVPR_09.tar"
        whole = make(name).downloads["indoorCVPR_09.tar"]
        publish(name, indoorCVPR_09=whole[: members_end(whole, 20) + 700])  # inside a member
    assert f"cannot unpack {tmp_path / file}" in refused("data", "prepare", name, "--root", tmp_path)
    assert tree_of(tmp_path) == {}


@pytest.mark.parametrize("more", [0, 300], ids=["between two members", "inside a header"])
def test_a_cut_that_the_tar_format_does_not_notice_is_refused_and_leaves_nothing(
    more, publish, tmp_path, refused, server
):
    whole = make("scenes").downloads["indoorCVPR_09.tar"]
    paths = publish("scenes", indoorCVPR_09=whole[: members_end(whole, 20) + more])
    assert "indoor-67" in refused("data", "prepare", "scenes", "--root", tmp_path)
    assert tree_of(tmp_path) == {}
    server.files[paths[0]] = whole
    assert prepare(tmp_path, "scenes") == 0
    assert tree_of(tmp_path) == make("scenes").tree


def test_files_of_the_user_stay_when_a_download_is_refused(publish, tmp_path, refused):
    publish("scenes", TestImages=b"bakery/none.jpg")
    images = {name: content for name, content in make("scenes").tree.items() if "/Images/" in name}
    put(tmp_path, images)
    assert "none.jpg" in refused("data", "prepare", "scenes", "--root", tmp_path)
    assert images.items() <= tree_of(tmp_path).items()


def test_a_page_in_place_of_a_list_is_refused_and_leaves_nothing(publish, tmp_path, refused, server):
    paths = publish("scenes", TestImages=b"<html>\n<body>Please log in.</body>\n</html>\n")
    assert "TestImages.txt" in refused("data", "prepare", "scenes", "--root", tmp_path)
    server.files[paths[2]] = make("scenes").downloads["TestImages.txt"]
    assert prepare(tmp_path, "scenes") == 0
    assert tree_of(tmp_path) == make("scenes").tree


def test_an_archive_without_the_expected_folder_is_refused_and_leaves_nothing(publish, tmp_path, refused):
    other = archive({"CUB_200_2010/README": b"of the year before"})
    publish("birds", CUB_200_2011=other)
    message = refused("data", "prepare", "birds", "--root", tmp_path)
    assert CATALOGUE["birds"].files[0].url in message
    assert str(tmp_path / "CUB_200_2011") in message
    assert tree_of(tmp_path) == {}
    publish("birds")
    assert prepare(tmp_path, "birds") == 0


@pytest.mark.parametrize("name", ["birds", "dtd", "svhn"])
def test_a_set_with_other_counts_is_refused_each_time(name, publish, tmp_path, refused):
    publish(name)
    row = CATALOGUE[name]
    CATALOGUE[name] = replace(row, images=row.images | {"test": row.images["test"] + 1}, classes=row.classes + 1)
    for _ in range(2):
        message = refused("data", "prepare", name, "--image_size", "16", "--root", tmp_path)
        assert f"{row.classes} classes rather than {row.classes + 1}" in message
        assert f"{row.images['test']} test images rather than {row.images['test'] + 1}" in message
    assert tree_of(tmp_path) == {}


def test_an_archive_of_the_user_is_used_and_stays(server, publish, tmp_path):
    publish("birds")
    content = make("birds").downloads["CUB_200_2011.tgz"]
    put(tmp_path, {"CUB_200_2011.tgz": content})
    assert prepare(tmp_path, "birds") == 0
    assert server.requests == []
    assert tree_of(tmp_path) == make("birds").tree | {"CUB_200_2011.tgz": content}


def test_a_wrong_archive_of_the_user_is_refused_and_stays(server, publish, tmp_path, refused):
    publish("birds")
    put(tmp_path, {"CUB_200_2011.tgz": b"of another kind"})
    message = refused("data", "prepare", "birds", "--root", tmp_path)
    assert f"remove {tmp_path / 'CUB_200_2011.tgz'}, or replace it" in message
    assert server.requests == []
    assert tree_of(tmp_path) == {"CUB_200_2011.tgz": b"of another kind"}


def test_files_of_a_killed_unpacking_are_ignored(publish, tmp_path):
    publish("birds")
    put(tmp_path, {".CUB_200_2011.tgz.unpacked/CUB_200_2011/half.txt": b"of another archive"})
    assert prepare(tmp_path, "birds") == 0
    assert tree_of(tmp_path) == make("birds").tree


# archives are not trusted


def tar_with(**member):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for attributes in ({"name": "good.txt"}, member):
            info = tarfile.TarInfo()
            info.size = 4 if attributes.get("type", tarfile.REGTYPE) == tarfile.REGTYPE else 0
            for key, value in attributes.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(b"data"))
    return buffer.getvalue()


def zip_with(name, mode=stat.S_IFREG | 0o644):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("good.txt", "data")
        info = zipfile.ZipInfo(name)
        info.external_attr, info.create_system = mode << 16, 3
        file.writestr(info, "data")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "member",
    [
        {"name": "../x"},
        {"name": "a/../../x"},
        {"name": "/ABSOLUTE/x"},
        {"name": "link", "type": tarfile.SYMTYPE, "linkname": "good.txt"},
        {"name": "link", "type": tarfile.SYMTYPE, "linkname": "/etc"},
        {"name": "hard", "type": tarfile.LNKTYPE, "linkname": "good.txt"},
        {"name": "pipe", "type": tarfile.FIFOTYPE},
        {"name": "device", "type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3},
        {"name": "disk", "type": tarfile.BLKTYPE, "devmajor": 8, "devminor": 0},
    ],
    ids=["up", "up-later", "absolute", "symlink", "symlink-out", "hard-link", "fifo", "device", "disk"],
)
def test_a_tar_file_must_contain_only_files_inside_its_folder(member, tmp_path):
    member = {
        key: value.replace("/ABSOLUTE", str(tmp_path)) if key == "name" else value for key, value in member.items()
    }
    check_refused(tmp_path, "spoilt.tar", tar_with(**member), member["name"])


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("../x", stat.S_IFREG),
        ("a/../../x", stat.S_IFREG),
        ("/ABSOLUTE/x", stat.S_IFREG),
        ("..\\x", stat.S_IFREG),
        ("\\x", stat.S_IFREG),
        ("link", stat.S_IFLNK),
        ("pipe", stat.S_IFIFO),
        ("device", stat.S_IFCHR),
    ],
    ids=["up", "up-later", "absolute", "backslash-up", "backslash", "symlink", "fifo", "device"],
)
def test_a_zip_file_must_contain_only_files_inside_its_folder(name, mode, tmp_path):
    name = name.replace("/ABSOLUTE", str(tmp_path))
    check_refused(tmp_path, "spoilt.zip", zip_with(name, mode | 0o644), name)


def check_refused(tmp_path, file, content, named):
    put(tmp_path, {f"in/{file}": content})
    with pytest.raises(DataError, match=re.escape(repr(named))) as error:
        extract(tmp_path / "in" / file, tmp_path / "in" / "out")
    assert file in str(error.value)
    assert tree_of(tmp_path) == {f"in/{file}": content}


@pytest.mark.parametrize("file", ["a.tar", "a.tar.gz", "a.tgz", "a.zip"])
def test_a_good_archive_is_unpacked_and_stays(file, tmp_path):
    tree = {"a/b.txt": b"first", "a/deep/c.txt": b"second", "d.txt": b"third"}
    if file.endswith("zip"):
        with zipfile.ZipFile(tmp_path / file, "w") as packed:
            for name, content in tree.items():
                packed.writestr(name, content)
    else:
        (tmp_path / file).write_bytes(archive(tree, compress=file.endswith("gz")))
    extract(tmp_path / file, tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree
    assert (tmp_path / file).exists()


@pytest.mark.parametrize("file", ["a.tar", "a.tar.gz", "a.zip"])
@pytest.mark.parametrize(
    "content",
    [b"", b"<html>moved</html>", bytes(100), gzip.compress(b"not a tar file")],
    ids=["empty", "page", "zeros", "gzip"],
)
def test_a_file_that_is_not_an_archive_is_refused(file, content, tmp_path):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=f"cannot unpack {re.escape(str(tmp_path / file))}"):
        extract(tmp_path / file, tmp_path / "out")
    assert tree_of(tmp_path) == {file: content}


def test_an_unsafe_archive_of_a_set_is_refused_in_one_line_and_leaves_nothing(publish, tmp_path, refused):
    publish("birds", CUB_200_2011=gzip.compress(tar_with(name="../x")))
    assert "'../x'" in refused("data", "prepare", "birds", "--root", tmp_path / "root")
    assert tree_of(tmp_path / "root") == {}
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
