"""The Content-Security-Policy of a page: only its own script and style run."""

import base64
import hashlib
import re


def page_policy(html: str) -> str:
    """The Content-Security-Policy of a page with one `<script>` and one `<style>`."""
    policy = [
        "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "connect-src 'self'; img-src 'self' data:",
    ]
    for tag in ("script", "style"):
        [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        policy.append(f"{tag}-src 'sha256-{digest}'")
    return "; ".join(policy)


LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]", "::1")
"""Host names allowed in requests to this machine; others come from foreign pages."""
