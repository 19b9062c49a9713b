"""A static audit of all that the two servers send: for every seed, and whatever the secrets are.

Of a program (`audit_program`), what would be deployed is traced and interpreted: `party.deal` once,
`party.online` as S1 and as S2. Of any function of protocols over paired arrays (`audit`), it is the
simulation, where both servers' work is one program. Every random word has a number. A value knows,
element by element, the word that *pads* it (it is a bijection of that word when all else is fixed),
and which others it depends on.

What is checked, for each server as a sender:

1. every element of a message is padded by a word of its sender's own seed, of the element's width;
2. no word pads two elements, of one message or of several;
3. the words that pad a message do not occur in the rest of it, nor in any message before. A share
   of a dealt value counts as all words of the masks that the dealt value depends on;
4. every element of a correction is padded by a word of S1's seed, which pads nothing else and which
   no correction depends on otherwise;
5. predicates, trip counts and addresses depend on public inputs only; nothing calls back to the
   host; and nothing but exchanges, each of which takes place once, or once in each iteration of a
   scan, joins what the two servers have;
6. every result is a sum, with public coefficients, of shares: those that the program is given, and
   fresh ones, which are blinded at S1 by a word that blinds no other; if that word pads a
   correction, S2 has this correction in its place. What a result tells of a mask, it tells with
   the message that this mask hides;
7. the function is traced alike the second time, and no rule for `vmap` runs in a simulation only.

Why that suffices. Fix the secrets and what the receiver holds at the start: its shares, its seed.
By 4, S2's corrections are uniform whatever the masks are; and given them, S1's share of a dealt
value is a function of the masks that the dealt value depends on (S2's share is, given S1's seed),
which is how 3 counts it. By 1 to 3 the last message is then uniform given the corrections and all
messages before it, since nothing of these depends on its pads; likewise the last but one, and so
on. So each server's view is uniform given what it held at the start, whatever the secrets are. By 6
whoever gets both halves of the results learns the sums that they are of, and of what a mask hides
no more than that.

Rounds (`mpc.rounds`) put the messages into another order. Each word stays what it was, and the
view is of all of them together, so what is shown of one order holds for any.

The interpretation errs on the safe side: what it does not know loses its pads. What stays outside
of it, and is taken for granted:

- ChaCha20's words are random, and every execution has a key of its own: whoever calls a function
  twice with one key is not seen;
- what a function closes over, its constants, and what Python computes while it is traced are
  public: shares that were turned into NumPy arrays, and branches of Python on them, are not seen;
- which values are results is the function's own business: that it returns what it should, and to
  whom results go, is not known. A result's last rounding tells a coin (docs/security.md);
- the sizes of the traced shapes: other sizes are another program.

| file | holds |
|---|---|
| `report` | what is found: the messages, and what is wrong |
| `values` | abstract values: numbered words, and what depends on which |
| `ledger` | what became of each word: the criteria for corrections, messages and results |
| `primitives` | what the interpreter must know of JAX's primitives |
| `interpreter` | runs a traced program on abstract values |
| `sender` | one that sends messages and returns results |
| `servers` | the programs of DS, S1 and S2: `audit_program` |
| `holders`, `simulated` | who could compute what in a simulation: `audit` |
| `tracing` | whether a function is traced alike every time |
| `memory` | how large a batch there is memory for |
| `compiled` | the compiled program: its rounds must be those of the plan: `audit_compiled` |
"""

from lpgan_jax.analysis.audit.compiled import audit_compiled, check_compiled
from lpgan_jax.analysis.audit.memory import largest_batch
from lpgan_jax.analysis.audit.report import Opening, Report
from lpgan_jax.analysis.audit.servers import audit_program
from lpgan_jax.analysis.audit.simulated import audit

__all__ = [
    "Opening",
    "Report",
    "audit",
    "audit_compiled",
    "audit_program",
    "check_compiled",
    "largest_batch",
]
