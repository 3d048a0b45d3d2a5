"""The page's file and its policy, without a browser."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode

from mistral_runtime.serve.page import content_security_policy, load_page


def test_the_policy_names_the_blocks_that_the_page_has_and_no_others():
    page = load_page()
    policy = page.headers["Content-Security-Policy"]
    script = page.body.partition(b"<script>")[2].partition(b"</script>")[0]
    assert f"script-src 'sha256-{b64encode(hashlib.sha256(script).digest()).decode()}'" in policy
    assert "unsafe" not in policy
    assert policy.count("sha256-") == 2
    assert "default-src 'none'" in policy


def test_a_changed_block_changes_the_policy():
    body = load_page().body
    assert content_security_policy(body) != content_security_policy(body.replace(b'"use strict";', b'"use strict"; '))


def test_the_page_asks_nobody_else():
    body = load_page().body.decode("utf-8")
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)[^"']*["']""", body) == []
    assert re.findall(r"""\son\w+\s*=|\sstyle\s*=\s*["']|@import|url\(""", body) == []
    addresses = set(re.findall(r"https?://[^\s'\"/]+", body.partition("<script>")[0]))
    assert addresses == {"http://www.w3.org"}, "only the name of SVG's namespace"
