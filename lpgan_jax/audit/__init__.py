"""A static audit of all that the two servers send: for every seed, and whatever the secrets are.

The programs that would be deployed are traced and interpreted: `party.deal` once, `party.online` as
S1 and as S2. Every random word has a number. A value knows, element by element, the word that
*pads* it (it is a bijection of that word when all else is fixed), and which others it depends on.

What is checked, for each server as a sender:

1. every element of a message is padded by a word of its sender's own seed, of the element's width;
2. no word pads two elements, of one message or of several;
3. the words that pad a message do not occur in the rest of it, nor in any message before. A share
   of a dealt value counts as all words of the masks that the dealt value depends on;
4. every element of a correction is padded by a word of S1's seed, which pads nothing else and which
   no correction depends on otherwise;
5. predicates, trip counts and addresses depend on public inputs only; nothing calls back to the
   host; and nothing but exchanges, outside of loops, talks to the other server.

Why that suffices. Fix the secrets and what the receiver holds at the start: its shares, its seed.
By 4, S2's corrections are uniform whatever the masks are; and given them, S1's share of a dealt
value is a function of the masks that the dealt value depends on (S2's share is, given S1's seed),
which is how 3 counts it. By 1 to 3 the last message is then uniform given the corrections and all
messages before it, since nothing of these depends on its pads; likewise the last but one, and so
on. So each server's view is uniform given what it held at the start, whatever the secrets are.

The interpretation errs on the safe side: what it does not know loses its pads. It takes for granted
that ChaCha20's words are random, that every execution has a key of its own, and that what a
function closes over is public.

| file | holds |
|---|---|
| `report` | what is found: the messages, and what is wrong |
| `values` | abstract values: numbered words, and what depends on which |
| `primitives` | what the interpreter must know of JAX's primitives |
| `interpreter` | runs a traced program on them |
| `servers` | DS, S1 and S2, whose programs must meet the criteria: `audit` |
| `compiled` | the compiled program, which must send the same messages: `audit_compiled` |
"""

from lpgan_jax.audit.compiled import audit_compiled, check_compiled
from lpgan_jax.audit.report import Opening, Report
from lpgan_jax.audit.servers import audit

__all__ = ["Opening", "Report", "audit", "audit_compiled", "check_compiled"]
