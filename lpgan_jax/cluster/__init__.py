"""DS, S1, S2 and SP as processes on a network.

| module | holds |
|---|---|
| `settings` | the cluster's configuration |
| `certificates` | who is who: mutual TLS |
| `wire` | messages, and how they are checked |
| `session`, `journal` | what a server knows of a training, and the results that wait for SP |
| `service`, `client` | both ends of gRPC |
| `servers`, `owners`, `provider` | what the roles do: S1 and S2, DS and further data owners, SP |
| `dealer` | DS's keys and programs: what each task needs |
| `reporting`, `supervisor` | a worker's reports, and who watches it |
| `tcp` | bytes on the servers' line, as the kernel counts them |
| `worker`, `display`, `roles` | the process of a role, its status for people, and the commands |

A worker lives for one *attempt* at training. Whatever goes wrong ends the attempt: the workers end,
the supervisors start new ones, and DS opens the next attempt from the newest step of which both
servers have a checkpoint, with a new master key. So there is one way to go on, whatever happened.
"""
