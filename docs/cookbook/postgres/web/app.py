"""Notes in PostgreSQL: POST / adds one, GET / lists all."""

import time
from pathlib import Path

import flask
import psycopg2

PASSWORD = Path("/run/secrets/password").read_text().strip()
WAIT_S = 40
app = flask.Flask(__name__)


def connect():
    """Return a connection.  While the database restarts or moves, requests wait."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            return psycopg2.connect(
                host="db", dbname="notes", user="notes", password=PASSWORD, connect_timeout=3
            )
        except psycopg2.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def query(statement, *values):
    connection = connect()
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(statement, values)
            return cursor.fetchall()
    finally:
        connection.close()


@app.post("/")
def add():
    text = flask.request.form.get("text", "empty")
    ((id,),) = query("INSERT INTO notes (text) VALUES (%s) RETURNING id", text)
    return f"added {id}\n"


@app.get("/")
def show():
    return "".join(f"{text}\n" for (text,) in query("SELECT text FROM notes ORDER BY id"))


@app.get("/health")
def health():
    return "ok\n"
