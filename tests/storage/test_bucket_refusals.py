"""Work directories in buckets that cannot be used: one line, before anything is compiled."""

import pytest

from helpers.fault_proxy import FaultProxy
from helpers.object_stores import variables
from helpers.program import finish, start

pytestmark = pytest.mark.whole


def refuse(url, *flags, **environment):
    code, out, err = finish(start("--config=configs/digits.py", f"--workdir={url}", *flags, **environment))
    assert code == 2 and not out.strip() and len(err.splitlines()) == 1 and err.startswith("error: "), (code, out, err)
    return err


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_a_missing_package_is_named(scheme, package, tmp_path):
    (tmp_path / f"{package}.py").write_text("raise ImportError('not installed')")
    err = refuse(f"{scheme}://bucket/run", PYTHONPATH=str(tmp_path))
    assert "pip install" in err and package in err


def test_a_read_only_bucket_is_named(bucket_url, scheme, emulators):
    with FaultProxy(emulators[scheme]) as proxy:
        proxy.inject("refuse", "write", status=403, times=10**9)
        assert "permission denied" in refuse(f"{bucket_url}/run", **variables(scheme, proxy.address))
