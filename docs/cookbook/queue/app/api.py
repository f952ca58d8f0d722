"""Jobs over HTTP: PUT /jobs/NAME adds one, GET /results lists what was done, GET / has the number of open jobs."""

import flask
import jobs

app = flask.Flask(__name__)
redis = jobs.connect()


@app.put("/jobs/<name>")
def add(name: str) -> str:
    jobs.add(redis, name, flask.request.get_data(as_text=True))
    return "accepted\n"


@app.get("/results")
def results() -> str:
    return "".join(f"{line}\n" for line in redis.lrange(jobs.RESULTS, 0, -1))


@app.get("/")
def waiting() -> str:
    return f"{redis.xlen(jobs.JOBS)} open\n"
