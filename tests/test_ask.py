"""eval.py ask: messages as they are written, the prompt, the page."""

import http.client
import http.server
import json
import re
import threading

import pytest
from ready import team_of
from tiny import write_tokenizer
from toy_runs import interrupt_at, printed, refused

import eval as evaluation
from teamtr_min import load_team
from teamtr_min.bench import ask
from teamtr_min.config import Config
from teamtr_min.engine.sampler import Sampler
from teamtr_min.hf.chat import load_tokenizer
from teamtr_min.tasks import Message, Role
from teamtr_min.team import Agent


def test_no_piece_of_a_text_is_half_a_character_and_together_they_are_the_text(tmp_path):
    (_, team), said = team_of(agents=1), []
    tokenizer = team.agents[0].tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    listener = ask.pieces(team, lambda agent, rollout, piece, ends: said.append(piece))
    ids = tokenizer.encode("naïve 日本 🧮")[:-1]  # cut off
    for what in (*ids, Message(0, ids, tokenizer.decode(ids), [], False)):
        listener(0, 3, what)
    assert said == [*"naïve 日本 ", "\ufffd"]


def test_at_the_prompt_all_commands_answer_and_ctrl_c_stops_one_answer(capsys, monkeypatch):
    _, team = team_of(agents=3)
    team.agents[1] = Agent(Role("tool\033[2J", "", tool=lambda problem, messages: "5\n\033[31m"))
    team.agents[2] = Agent(Role("silent", "", tool=lambda problem, messages: ""))
    monkeypatch.setenv("NO_COLOR", "1")
    interrupt_at(3, monkeypatch, Sampler, "generate")
    typed = iter("7+8*3-1|/retry|1+1*1-1|/samples 3 1+2*3-1|/samples 0|/what|hello|/agents||/help".split("|"))
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    with pytest.raises(StopIteration):
        ask.converse(team, "mine", 1, 7)
    out, tool = capsys.readouterr().out, "  tool\ufffd[2J: 5\n    \ufffd[31m\n"
    texts = {team.solve("7+8*3-1", seed=seed)[0].messages[0].text for seed in (7, 8)}
    assert len(texts) == 2 and all(f"  A: {text}\n{tool}answer: 5\n" in out for text in texts)
    assert out.count("  stopped\n") == 1 and f"\n    3 of 3  {'█' * 24}  5\n" in out and "\033" not in out
    assert re.findall("^error: (\\S+)", out, re.MULTILINE) == ["/samples", "/what", "the"]


def test_the_page_streams_what_the_team_says_and_refuses_the_pages_of_others(monkeypatch):
    (_, team), serve, got = team_of(agents=2), http.server.ThreadingHTTPServer.serve_forever, []
    ask_for, closed = "/ask?question={}&samples=3&seed=5".format, "/ask?question=1%2B1*3&samples=200&seed=0"
    requests = [("/?q=1", {}), ("/", {"Host": "evil"}), (ask_for("1"), {"Sec-Fetch-Site": "cross-site"})]
    requests += [(ask_for("1" * 70000), {}), (ask_for("hello"), {}), (closed, {}), (ask_for("7%2B8*3"), {})]

    def visit(server):
        threading.Thread(target=serve, args=(server,)).start()
        for path, headers in requests:
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
            connection.request("GET", path, headers=headers)
            if path != closed:  # a tab that is closed at once
                got.append(((response := connection.getresponse()).status, response.read().decode()))
            connection.close()
        server.shutdown()
        raise KeyboardInterrupt

    monkeypatch.setattr(http.server.ThreadingHTTPServer, "serve_forever", visit)
    ask.serve(team, "</script>", 5, 0)
    assert [status for status, _ in got] == [200, 403, 403, 414, 200, 200]
    assert "\\u003c/script>" in got[0][1] and "has no tokens" in got[4][1]
    *events, last = [json.loads(line[6:]) for line in got[5][1].splitlines() if line]
    answers = team.solve("7+8*3", 3, seed=5)
    first = "".join(event["piece"][2] for event in events if event["piece"][1] == 0)
    assert first == "".join(message.text for message in answers[0].messages)
    assert last["votes"] == [list(vote) for vote in ask.votes(team.task, [a.answer for a in answers])]


def test_a_team_can_be_asked_without_its_data_set_but_not_before_it_has_agents(capsys, tmp_path):
    Config(task="gsm8k", agents=2, max_new_tokens=8, device="cpu").save(tmp_path / "config.json")
    assert "holds no agents" in refused(capsys, evaluation.main, "ask", "--team", str(tmp_path), "1+1")
    team_of(agents=2)[1].save(tmp_path / "agents")
    assert "\n  Agent 2: " in printed(capsys, "ask", "--team", str(tmp_path), "1+1")
    assert "maths" in load_team(tmp_path).agents[0].role.system, "as in training"
