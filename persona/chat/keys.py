"""The key of a prompt in the cache: what its reply depends on and whom it is about, as a hash."""

import hashlib
import json
from dataclasses import asdict

from persona.chat.base import ChatPrompt


def key_of(identity: str, prompt: ChatPrompt, user_id: str) -> str:
    """The hash of a model's identity, all of a prompt and a user, 32 hexadecimal digits.

    Two users never share a reply, so that forgetting one of them takes nothing from the other and leaves nothing.
    """
    content = json.dumps({"model": identity, "user_id": user_id, **asdict(prompt)}, sort_keys=True)
    return hashlib.blake2b(content.encode(errors="surrogatepass"), digest_size=16).hexdigest()
