"""Media may lie below their data set's root and nowhere else, whatever they are called."""

from pathlib import Path

import pytest
from media_files import SPEC, decode, even, write_video
from PIL import Image

from avflow.datasets.media import MediaError, decode_media
from avflow.datasets.roots import inside
from avflow.datasets.sample import MediaPart


@pytest.mark.parametrize(
    "name", ["../outside.mp4", "a/../../outside.mp4", "/etc/hostname", ".", ""]
)
def test_names_may_not_leave_the_root(tmp_path: Path, name: str) -> None:
    (tmp_path / "root").mkdir()
    write_video(tmp_path / "outside.mp4", even(1, 4))
    with pytest.raises(MediaError, match="leaves the data set's root"):
        decode_media(tmp_path / "root", MediaPart(kind="video", path=name), SPEC)


@pytest.mark.parametrize("name", ["a\0.mp4", "a\udcff.mp4"])
def test_what_no_table_could_hold_is_no_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(MediaError, match="is no file's name") as caught:
        inside(tmp_path, name)
    assert str(caught.value).encode()


def test_links_may_not_leave_the_root_either(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "videos").mkdir(parents=True)
    outside = write_video(tmp_path / "outside.mp4", even(1, 4))
    (root / "file.mp4").symlink_to(outside)
    (root / "folder").symlink_to(tmp_path)
    (root / "dangling.mp4").symlink_to(tmp_path / "nowhere.mp4")
    for name in ("file.mp4", "folder/outside.mp4", "dangling.mp4"):
        with pytest.raises(MediaError, match="link out of the data set's root"):
            decode_media(root, MediaPart(kind="video", path=name), SPEC)


def test_a_link_to_itself_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").symlink_to("a.mp4")
    with pytest.raises(MediaError, match=r"a\.mp4"):  # Pythons differ in what they find there
        decode_media(tmp_path, MediaPart(kind="video", path="a.mp4"), SPEC)


def test_links_within_the_root_and_to_the_root_are_followed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    write_video(root / "a.mp4", even(1, 4))
    (root / "b.mp4").symlink_to("a.mp4")
    (tmp_path / "alias").symlink_to(root)
    for folder in (root, tmp_path / "alias"):
        assert decode(folder / "b.mp4").frames is not None


def test_a_snapshot_of_the_hugging_face_cache_is_a_root(tmp_path: Path) -> None:
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "f00d"
    blobs = tmp_path / "datasets--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_video(tmp_path / "x.mp4", even(1, 4)).rename(blobs / "d1e5")
    (snapshot / "a.mp4").symlink_to("../../blobs/d1e5")
    (snapshot / "b.mp4").symlink_to("../../../secret.mp4")
    assert decode(snapshot / "a.mp4").frames is not None
    with pytest.raises(MediaError, match="link out of"):
        inside(snapshot, "b.mp4")


@pytest.mark.parametrize(
    "name", ["视频 一.mp4", "vidéo.mp4", "100%d.mp4", "a|b.mp4", "http:x.mp4", "-i.mp4", "🎬.mp4"]
)
def test_any_name_will_do(tmp_path: Path, name: str) -> None:
    assert decode(write_video(tmp_path / name, even(1, 4))).frames is not None


def test_the_extension_says_nothing(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", even(2, 10), sound_s=2)
    for name in ("a.jpg", "a.mkv", "a.wav", "a.txt", "a"):
        path = tmp_path / name
        path.write_bytes((tmp_path / "a.mp4").read_bytes())
        media = decode(path, with_audio=True)
        assert media.frames is not None
        assert media.waveform is not None
    Image.new("RGB", (30, 30), (255, 0, 0)).save(tmp_path / "p.png")
    (tmp_path / "p.png").rename(tmp_path / "p.mp4")
    assert decode(tmp_path / "p.mp4", kind="image").frames is not None
    with pytest.raises(MediaError, match="its kind is 'image', not 'video'"):
        decode(tmp_path / "p.mp4")


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{target}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{target}'\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
    ],
)
def test_a_playlist_does_not_open_other_files(tmp_path: Path, text: str) -> None:
    target = write_video(tmp_path / "secret.ts", even(2, 10))
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.mp4").write_text(text.format(target=target))
    with pytest.raises(MediaError, match="damaged, or no video file"):
        decode(tmp_path / "root" / "a.mp4")
