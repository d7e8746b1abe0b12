"""Questions to a team: in a terminal, from a pipe, or on a page. Messages appear as they are written."""

import collections
import contextlib
import http.server
import os
import re
import sys
import threading
import urllib.parse
from argparse import Namespace
from collections.abc import Callable, Iterator

import torch

from teamtr_min.bench.accuracy import find_team, votes
from teamtr_min.bench.report import filled
from teamtr_min.files import UserError, to_json
from teamtr_min.run.loading import build_team, task_to_ask
from teamtr_min.tasks.task import Message
from teamtr_min.team import Listener, Team

MOST_SAMPLES = 256  # of one question, at a prompt or on the page
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")  # a terminal obeys these
HELP = f"""/retry                 the last question with the next seed
/samples N [QUESTION]  this or the last question: one of N rollouts, up to {MOST_SAMPLES}, and what all answer
/agents                names and system prompts"""
TOLD = (UserError, OSError, FloatingPointError, torch.OutOfMemoryError)  # errors that need no traceback


def run(questions: list[str], args: Namespace, flags: dict) -> Iterator[tuple[dict, str]]:
    """Answer the questions; without any, the lines of the standard input, or what is typed at a prompt. With
    --json nothing is printed here: every rollout is yielded."""
    if args.k > MOST_SAMPLES:
        raise UserError(f"--k {args.k} are too many rollouts of one question; ask takes up to {MOST_SAMPLES}")
    exam = find_team(args.team or None, flags)
    team, seed = build_team(exam.config, task_to_ask(exam.config), sources=exam.sources), exam.config.seed
    if not exam.sources:
        print("the team that answers is untrained; --team names a run", file=sys.stderr)
    if args.web:
        return serve(team, exam.team, seed, args.port)
    if not args.json and not questions and sys.stdin.isatty():
        return converse(team, exam.team, args.k, seed)
    for question in filter(None, map(str.strip, questions or sys.stdin)):
        if not args.json:
            write(team, question, args.k, seed)
            continue
        for messages, answer in team.solve(question, args.k, seed=seed):
            said = [message._asdict() for message in messages]
            yield {"question": question, "messages": said, "answer": answer}, ""


def pieces(team: Team, say: Callable[[int, int, str, bool], None]) -> Listener:
    """Tells `say(agent, rollout, piece, ends)` the text of messages as it grows, never half a character."""
    tokens, told = collections.defaultdict(list), collections.defaultdict(str)  # of a rollout's message

    def listener(agent: int, rollout: int, what: int | Message) -> None:
        before, ends = told[rollout], isinstance(what, Message)
        tokens[rollout] = [] if ends else [*tokens[rollout], what]
        text = what.text if ends else team.agents[agent].tokenizer.decode(tokens[rollout])
        if ends or text.startswith(before) and not text.endswith("\ufffd"):
            told[rollout] = "" if ends else text
            say(agent, rollout, text.removeprefix(before), ends)

    return listener


def names(team: Team) -> list[str]:
    """Of the agents, in colour on a terminal."""
    found = [agent.role.name.translate(CONTROLS) for agent in team.agents]
    plain = os.environ.get("NO_COLOR") or not sys.stdout.isatty()
    return found if plain else [f"\033[1;{36 - j % 6}m{name}\033[0m" for j, name in enumerate(found)]


def write(team: Team, question: str, samples: int, seed: int) -> None:
    """Answer on the terminal: messages as they grow; of several rollouts those of the first, and votes."""
    headers, within = names(team), False  # a line

    def say(agent: int, rollout: int, piece: str, ends: bool) -> None:
        nonlocal within
        if rollout == 0:
            header = "" if within else f"  {headers[agent]}: "
            print(header + piece.translate(CONTROLS).replace("\n", "\n    "), end="\n" * ends, flush=True)
            within = not ends

    try:
        answers = team.solve(question, samples, None, seed, pieces(team, say))
    finally:
        print(end="\n" * within)  # after Ctrl-C
    found = votes(team.task, [rollout.answer for rollout in answers])
    for answer, its in found if samples > 1 else ():
        bar = "█" * (24 * len(its) // samples)
        print(f"  {len(its):3d} of {samples}  {bar:24s}  {answer}".translate(CONTROLS))
    print(f"answer: {found[0][0]}".translate(CONTROLS))


def converse(team: Team, name: str, samples: int, seed: int) -> None:
    """Answer what is typed, until the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() a history
    print(f"{name}: {', '.join(names(team))}; /help tells more, Ctrl-C stops an answer, Ctrl-D ends")
    roles = [f"  {n}: {a.role.system if a.model else '(a tool)'}" for n, a in zip(names(team), team.agents)]
    told, last = {"/help": HELP, "/agents": "\n".join(roles)}, ("", samples, seed)
    while True:
        line = None
        try:
            line = input("> ").strip()
            command, count, question = (*line.split(maxsplit=2), "", "", "")[:3]
            if command in told:
                print(told[command])
            elif line:
                number = int(count) if count.isdecimal() else 0
                known = {"/retry": (*last[:2], last[2] + 1), "/samples": (question or last[0], number, seed)}
                asked = known.get(command, ("", 0, 0)) if line[0] == "/" else (line, samples, seed)
                if not asked[0]:
                    raise UserError(f"{command} is no command, or lacks a question; see /help")
                if not 0 < asked[1] <= MOST_SAMPLES:
                    raise UserError(f"/samples takes a number from 1 to {MOST_SAMPLES}, then the question")
                last = asked
                write(team, *last)
        except (EOFError, KeyboardInterrupt):
            if line is None:
                return print()
            print("  stopped")
        except TOLD as error:
            print(f"error: {error}")


def serve(team: Team, name: str, seed: int, port: int) -> None:
    """A page to ask the team on, until Ctrl-C. Raises UserError for a port that cannot be had."""
    agents = [{"name": a.role.name, "system": a.role.system, "tool": a.model is None} for a in team.agents]
    data = {"team": name, "agents": agents, "seed": seed, "most": MOST_SAMPLES}
    page = filled("ask.html", data, connect="connect-src 'self'; ").encode()
    busy, address = threading.Lock(), ("127.0.0.1", port)
    try:
        server = http.server.ThreadingHTTPServer(address, lambda *r: Handler(team, page, busy, *r))
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port} cannot be had: {error}") from None
    with contextlib.suppress(KeyboardInterrupt):
        print(f"http://127.0.0.1:{server.server_port} is the page; Ctrl-C ends it", flush=True)
        server.serve_forever()
    server.server_close()
    busy.acquire()  # no thread computes any more
    for thread in threading.enumerate()[1:]:
        thread.join(0.3)  # it may have the last reference to the team; an idle one has to wait for nothing


class Handler(http.server.BaseHTTPRequestHandler):
    """The page; at /ask?question=&samples=&seed= an answer, as server-sent events."""

    timeout = 60  # seconds that a browser may let us wait
    log_message = lambda *what: None  # noqa: E731

    def __init__(self, team: Team, page: bytes, busy: threading.Lock, *request):
        self.team, self.page, self.busy = team, page, busy  # one answer at a time
        with contextlib.suppress(OSError):  # a browser may go away at any time
            super().__init__(*request)

    def do_GET(self) -> None:
        asked = re.fullmatch(r"/ask\?question=([^&]+)&samples=([1-9]\d{0,2})&seed=(\d{1,15})", self.path)
        host, site = (self.headers.get(name, "") for name in ("Host", "Sec-Fetch-Site"))
        if host.split(":")[0] not in ("127.0.0.1", "localhost") or asked and site == "cross-site":
            return self.send_error(403, "only for pages of this server")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if asked else "text/html")
        self.end_headers()
        if not asked:
            return self.wfile.writelines([self.page])
        how = urllib.parse.unquote_plus(asked[1]), min(int(asked[2]), MOST_SAMPLES), None, int(asked[3])
        try:
            with self.busy:
                answers = self.team.solve(*how, pieces(self.team, lambda *piece: self.tell(piece=piece)))
            self.tell(votes=votes(self.team.task, [rollout.answer for rollout in answers]))
        except TOLD as error:
            self.tell(error=str(error))

    def tell(self, **event) -> None:
        self.server.socket.getsockname()  # OSError: the server is closed
        self.wfile.write(f"data: {to_json(event)}\n\n".encode())
