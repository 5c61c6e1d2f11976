"""Classifiers behind a server: batches, tokens, failures, and answers that are none."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_blackboxes import CLASSES, answers, images, network, write_card

from cae.classifiers import load


def test_a_server_that_fails_is_asked_again_and_one_that_goes_on_failing_is_named(serve: Any, tmp_path: Path) -> None:
    server = serve(answers(network()))
    card = tmp_path / "card.json"
    write_card(card, classifier=server.url, retries=2, timeout=5)
    blackbox, x = load(str(card)), images()
    expected = blackbox(x)
    server.failures = [503, 429]
    assert torch.equal(blackbox(x), expected)
    server.failures = [503, 500, 502]
    with pytest.raises(ConnectionError, match=rf"^the classifier at {server.url} answers 502: out of order$"):
        blackbox(x)
    server.failures, asked = [404], len(server.asked)
    with pytest.raises(ValueError, match="answers 404"):  # asking again would change nothing
        blackbox(x)
    assert len(server.asked) == asked + 1

    write_card(card, classifier=server.url, retries=1, timeout=0.3)
    server.pause = 1.0
    with pytest.raises(ConnectionError, match=r"does not answer: .*timed out"):
        load(str(card))
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(ConnectionError, match=r"does not answer: .*refused"):
        load(str(card))


def test_a_server_gets_batches_and_its_token(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(answers(network()))
    write_card(tmp_path / "card.json", classifier=server.url, batch=2, token="THEIR_TOKEN")
    with pytest.raises(ValueError, match=r"\$THEIR_TOKEN .* not set"):
        load(f"{tmp_path}/card.json")
    monkeypatch.setenv("THEIR_TOKEN", "open sesame")
    blackbox = load(f"{tmp_path}/card.json")
    server.asked.clear()
    x = images(5)
    blackbox(x)
    assert [len(body["instances"]) for body, _ in server.asked] == [2, 2, 1]
    assert {headers["Authorization"] for _, headers in server.asked} == {"Bearer open sesame"}
    sent = np.array([image for body, _ in server.asked for image in body["instances"]])
    np.testing.assert_allclose(sent, (x.numpy() + 1) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (lambda body: {"predictions": [[1.0, 2.0]]}, "1 rows for 2 images"),
        (lambda body: {"error": "no"}, "KeyError: 'predictions'"),
        (lambda body: {"predictions": [["a", "b"]] * 2}, "gives no list of numbers for each image"),
        (lambda body: {"predictions": [[1.0, 2.0], [1.0]]}, "gives no list of numbers for each image"),
        (lambda body: "fine", "gives no list of numbers for each image"),
        (lambda body: {"predictions": [[[1.0, 2.0]]] * 2}, "too many values to unpack"),
    ],
)
def test_answers_that_are_none(serve: Any, reply: Any, says: str) -> None:
    server = serve(reply)
    with pytest.raises(ValueError) as error:
        load(server.url)
    text = str(error.value)
    assert says in text and server.url in text and "\n" not in text


@pytest.mark.parametrize("names", [CLASSES, ("0", "1", "2")])
@pytest.mark.parametrize(("own", "classes"), [(CLASSES, ()), (CLASSES, CLASSES), ((), CLASSES)])
def test_named_columns_are_put_in_the_order_of_the_classes(
    serve: Any, tmp_path: Path, names: tuple[str, ...], own: tuple[str, ...], classes: tuple[str, ...]
) -> None:
    """As MLflow answers for a data frame; here another order for each image."""
    held = list(zip(names, (1.0, 2.0, 3.0), strict=True))
    server = serve(lambda body: {"predictions": [dict(held[i:] + held[:i]) for i in range(len(body["inputs"]))]})
    write_card(tmp_path / "card.json", classifier=server.url, protocol="mlflow", classes=own)
    assert load(f"{tmp_path}/card.json", classes)(images(3)).tolist() == [[1, 2, 3]] * 3


@pytest.mark.parametrize(("classes", "known"), [((), "not known"), (("bird", "cat", "cow"), "bird, cat, cow")])
def test_names_of_no_class_are_refused(serve: Any, classes: tuple[str, ...], known: str) -> None:
    server = serve(lambda body: {"predictions": [{"dog": 3.0, "bird": 1.0, "cat": 2.0}] * len(body["instances"])})
    with pytest.raises(ValueError, match=f"it names dog, bird, cat and the classes are {known}: name its outputs"):
        load(server.url, classes)


@pytest.mark.parametrize(("name", "fits"), [("sick", True), ("p", True), ("well", False)])
def test_one_named_number_is_the_second_class_s(serve: Any, name: str, fits: bool) -> None:
    server = serve(lambda body: {"predictions": [{name: 3.0}] * len(body["instances"])})
    if fits:
        assert load(server.url, ("well", "sick"))(images(1)).tolist() == [[-1.5, 1.5]]
    else:
        with pytest.raises(ValueError, match="it names well and the classes are well, sick"):
            load(server.url, ("well", "sick"))


MODEL = """
import numpy as np
from mlflow.pyfunc import PythonModel
from mlflow.models import set_model
class Channels(PythonModel):
    def predict(self, context, model_input, params=None):
        return np.asarray(model_input).mean((2, 3))
set_model(Channels())
"""


def test_mlflow_s_own_scoring_server_is_understood(tmp_path: Path) -> None:
    import mlflow
    import uvicorn
    from mlflow.pyfunc.scoring_server import init

    (tmp_path / "model.py").write_text(MODEL)
    mlflow.pyfunc.save_model(str(tmp_path / "model"), python_model=str(tmp_path / "model.py"), pip_requirements=[])
    app = init(mlflow.pyfunc.load_model(str(tmp_path / "model")))
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.05)
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}/invocations"
        write_card(tmp_path / "card.json", classifier=url, protocol="mlflow")
        x = images()
        outputs = load(f"{tmp_path}/card.json")(x)
        torch.testing.assert_close(outputs, ((x + 1) / 2).mean((2, 3)), rtol=0, atol=1e-5)
    finally:
        server.should_exit = True
        thread.join()
