"""Addresses: taken apart, refused, and shown without what is secret."""

import pytest

from dreambooth.config.addresses import Address, check_address, shown, without_credentials
from dreambooth.errors import InputError


class TestParts:
    @pytest.mark.parametrize(
        ("text", "scheme", "host", "port", "user", "password"),
        [
            ("http://mlflow:5000/x", "http", "mlflow", 5000, None, None),
            ("127.0.0.1:6379", "", "127.0.0.1", 6379, None, None),
            ("[::1]:6379", "", "::1", 6379, None, None),
            ("HTTPS://me:a%2Fb%40c@[fe80::1]:1/x?y=z", "https", "fe80::1", 1, "me", "a/b@c"),
            ("postgresql+psycopg://me:pw@db/mlflow", "postgresql+psycopg", "db", None, "me", "pw"),
            ("s3://bucket/a@b:c", "s3", "bucket", None, None, None),
            ("simplecache::s3://bucket/x", "s3", "bucket", None, None, None),
            ("sftp://me@host/x", "sftp", "host", None, "me", None),
            ("memory://x", "memory", "x", None, None, None),
        ],
    )
    def test_of_a_sound_one(
        self, text: str, scheme: str, host: str, port: int | None, user: str | None, password: str | None
    ) -> None:
        parts = Address.parse(text, what="x")
        assert (parts.scheme, parts.host, parts.port, parts.user, parts.password) == (
            scheme, host, port, user, password
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("http://host:notaport", "expected a port from 1 to 65535"),
            ("http://host:0", "expected a port from 1 to 65535"),
            ("http://host:65536", "expected a port from 1 to 65535"),
            ("http://host:" + "9" * 5000, "expected a port from 1 to 65535"),
            ("http://host:²", "expected a port from 1 to 65535"),
            ("http://host:", "expected a port from 1 to 65535"),
            ("http://:5000", "expected the name of a host"),
            ("http://ho st:5000", "expected the name of a host, without blanks"),
            ("http://ho\nst", "control character U+000A"),
            ("http://ho\u200bst", "expected the name of a host, without blanks"),
            ("http://[::1:5000", "brackets"),
            ("http://[nonsense]:5000", "expected an IPv6 address in the brackets"),
            ("::1:5000", "an IPv6 address goes in brackets"),
            ("http://me:pa/ss@host", "write it as %2F, %3F, %23 or %40"),
            ("http://me:12/34@host", "write it as %2F, %3F, %23 or %40"),
            ("http://me:pa#ss@host", "write it as %2F, %3F, %23 or %40"),
            ("http://me:pa?ss@host", "write it as %2F, %3F, %23 or %40"),
            ("http://me:pa@ss@host", "write it as %2F, %3F, %23 or %40"),
            ("1http://host", "expected an address such as scheme://host"),
            ("s3://", "expected the name of a bucket behind s3://"),
            ("gs:///results", "expected the name of a bucket behind gs://"),
            ("simplecache::s3:///x", "expected the name of a bucket behind s3://"),
            ("https:///x", "expected the name of a host behind https://"),
            ("sftp://me@/x", "expected the name of a host behind sftp://"),
        ],
    )
    def test_of_none(self, text: str, expected: str) -> None:
        with pytest.raises(InputError, match=r"^the tracker ") as refused:
            Address.parse(text, what="the tracker")
        assert expected in str(refused.value)

    @pytest.mark.parametrize(
        ("address", "meant"), [("s3:/bucket/x", "s3://bucket/x"), ("S3:bucket", "S3://bucket"), ("http:/h", "http://h")]
    )
    def test_with_a_slash_too_few(self, address: str, meant: str) -> None:
        with pytest.raises(InputError) as refused:
            check_address(address, what="storage.root")
        assert str(refused.value) == (
            f"storage.root is {address!r}, a path of this machine; write {meant}, or ./{address}"
        )

    @pytest.mark.parametrize(
        "path",
        ["output", "./a b/c", "/x/y:z@1", "Ali\u200dAhmad", "models:/a@latest", "sqlite:////x/y.db", "file:///x"],
    )
    def test_a_path_of_this_machine_passes(self, path: str) -> None:
        assert check_address(path, what="x") == path


class TestWhatIsShown:
    @pytest.mark.parametrize(
        ("address", "expected"),
        [
            ("http://me:secret@mlflow:5000/x", "http://me:***@mlflow:5000/x"),
            ("https://ghp_token@host/x", "https://***@host/x"),
            ("postgresql://me:s/e#c?r@e%t@db:5432/mlflow", "postgresql://me:***@db:5432/mlflow"),
            ("postgresql://db/mlflow?user=me&password=secret&sslmode=require", "postgresql://db/mlflow?user=***&password=***&sslmode=require"),
            ("https://b.s3.amazonaws.com/x.png?X-Amz-Credential=AKIA&X-Amz-Signature=abc", "https://b.s3.amazonaws.com/x.png?X-Amz-Credential=***&X-Amz-Signature=***"),
            ("http://host/x?user=a@b&password=c", "http://***@b&password=***"),
            ("http://host/x#access_token=abc", "http://host/x#access_token=***"),
            ("http://me:secret", "http://me:***"),
            ("http://me:secret@[::1]:5000", "http://me:***@[::1]:5000"),
            ("s3://AKIA:secret@bucket/x", "s3://AKIA:***@bucket/x"),
            ("zip://x.png::https://me:secret@host/y.zip", "zip://x.png:***@host/y.zip"),
        ],
    )  # fmt: skip
    def test_of_one_with_credentials(self, address: str, expected: str) -> None:
        assert shown(address) == expected
        assert "secret" not in without_credentials(f"can't open '{address}', really; ({address})")

    @pytest.mark.parametrize(
        "address",
        [
            "http://[::1]:5000/x", "s3://bucket/a@b", "s3://bucket/photos/?.png", "models:/dog@latest", "/a:b@c",
            "sqlite:////tmp/a:b@c/mlflow.db", "abfs://container@account.dfs.core.windows.net/x", "127.0.0.1:6379",
            "output/My Dog", "memory://x/y", "sftp://me@host/x", "postgresql://me@db/mlflow",
        ],
    )  # fmt: skip
    def test_of_one_without(self, address: str) -> None:
        assert shown(address) == address
        assert without_credentials(f"nothing at {address}; really") == f"nothing at {address}; really"

    def test_of_one_without_a_scheme(self) -> None:
        assert shown("me:secret@host:6379") == "me:***@host:6379"

    def test_secrets_of_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter22")
        monkeypatch.setenv("HTTPS_PROXY", "http://me:trustno1@proxy:3128")
        assert without_credentials("hunter22 and trustno1 are refused") == "*** and *** are refused"
