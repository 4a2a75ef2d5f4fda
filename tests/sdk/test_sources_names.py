"""No password of a source is ever shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from affect_edge._source_names import masked, url_scheme


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("rtsp://admin:pass@10.0.0.2:554/live", "rtsp://admin:***@10.0.0.2:554/live"),
        ("rtsp://admin:p@ss/w:rd@cam/1", "rtsp://admin:***@cam/1"),
        ("rtsp://admin:pa ss?w#rd@cam/1", "rtsp://admin:***@cam/1"),
        ("https://token@cam/1", "https://***@cam/1"),
        ("https://admin:@cam/1", "https://admin:***@cam/1"),
        ("rtsp://cam/live?channel=2&user=a&password=b", "rtsp://cam/live?channel=2&user=***&password=***"),
        ("http://cam/live?secretkey", "http://cam/live?***"),
        ("http://cam/live?me=a:b@c", "http://cam/live?me=a:***@c"),
        ("rtsp://cam/user=admin_password=tlJw_channel=1.sdp", "rtsp://cam/user=admin_password=***"),
        ("udp://@239.0.0.1:1234", "udp://@239.0.0.1:1234"),
        ("rtsp:/admin:pass@cam", "rtsp://admin:***@cam"),
        ("rtspsrc location=rtsp://a:b!c@cam user-id=x user-pw=y ! appsink", None),
        ('rtspsrc location="rtsp://a:b c@cam" user-pw="y z" ! appsink', None),
        ("camera 0", "camera 0"),
        ("clips/a@b.mp4", "clips/a@b.mp4"),
        (r"C:\clips\a.mp4", r"C:\clips\a.mp4"),
    ],
)
def test_passwords_are_masked(text: str, shown: str | None) -> None:
    if shown is not None:
        assert masked(text) == shown
    for secret in ("pa ss", "p@ss", "w:rd", "b!c", "b c@", "user-pw=y", "y z", "tlJw", "secretkey", "a:b@"):
        assert secret not in masked(text)


@given(
    st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), min_size=5), st.sampled_from("@/?#!: ")
)
def test_whatever_the_password_is(password: str, inside: str) -> None:
    secret = f"{password}{inside}{password}"
    shown = masked(f"rtsp://me:{secret}@cam.example/live")
    assert " ! " in secret or shown == "rtsp://me:***@cam.example/live"


@pytest.mark.parametrize(
    ("text", "scheme"),
    [("RTSP://cam", "rtsp"), ("udp://@1", "udp"), ("C://a", None), ("a.mp4", None), ("rtsp:/cam", None), ("://", None)],
)
def test_schemes(text: str, scheme: str | None) -> None:
    assert url_scheme(text) == scheme
