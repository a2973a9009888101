"""Two small databases of singers and songs for the tests of the reward's judge."""

SINGERS = """
CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT, country TEXT, age INT, value INT);
CREATE TABLE song (id INTEGER PRIMARY KEY, singer_id INT REFERENCES singer, length REAL);
INSERT INTO singer VALUES
    (1, 'Ann', 'USA', 30, 1), (2, 'Bob', 'Peru', 41, 2), (3, 'Cid', 'USA', 25, 3),
    (4, '> =', 'Peru', 41, 4);
INSERT INTO song VALUES (1, 1, 0.1), (2, 1, 0.2), (3, 2, 0.3), (4, 3, 0.7), (5, 3, 1e-9);
"""
"""Names that look like operators, ages that tie, lengths whose sums depend on their order."""

SHOWS = """
CREATE TABLE singer (
    singer_id INTEGER PRIMARY KEY, name TEXT, country TEXT, age INTEGER, sales REAL,
    planet TEXT DEFAULT 'Earth'
);
CREATE TABLE song (
    song_id INTEGER PRIMARY KEY, title TEXT, year INTEGER,
    singer_id INTEGER REFERENCES singer (singer_id)
);
INSERT INTO singer (singer_id, name, country, age, sales) VALUES
    (1, 'Ann', 'USA', 30, 0.1), (2, 'Bob', 'France', 41, 0.2), (3, 'Cid', 'USA', 25, 0.3),
    (4, 'Dan', 'Peru', 52, 0.7), (5, 'Eve', 'France', 33, NULL);
INSERT INTO song VALUES
    (1, 'Up', 2001, 1), (2, 'Down', 2003, 1), (3, 'On', 2001, 2), (4, 'Off', 2010, 4),
    (5, 'In', 2003, 4);
"""
"""Few rows, on which wrong queries often agree with a gold by accident."""

USA = "SELECT name FROM singer WHERE country = 'USA'"
