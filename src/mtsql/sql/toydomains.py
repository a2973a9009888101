"""The words of the embedded world: which things its databases are about, which columns they have, which values."""

# (thing, what it belongs to): one database each. Plurals are regular.
TRAIN_DOMAINS = (
    ("singer", "band"), ("player", "club"), ("student", "school"), ("doctor", "hospital"), ("driver", "team"),
    ("book", "author"), ("movie", "studio"), ("car", "maker"), ("employee", "company"), ("pilot", "airline"),
    ("dish", "cook"), ("game", "store"), ("song", "album"), ("teacher", "college"), ("ship", "port"),
    ("horse", "farm"), ("tree", "park"), ("room", "hotel"), ("bridge", "river"), ("painting", "artist"),
    ("phone", "brand"), ("train", "station"), ("dancer", "theater"), ("wine", "region"),
)  # fmt: skip
DEV_DOMAINS = (
    ("writer", "paper"), ("nurse", "clinic"), ("runner", "race"), ("plane", "airport"), ("actor", "show"),
    ("laptop", "shop"), ("worker", "plant"), ("poem", "magazine"),
)  # fmt: skip

# Column -> the values its rows may have, as a question spells them.
CATEGORIES = {
    "country": ("usa", "france", "japan", "brazil", "kenya", "india", "spain"),
    "city": ("new york", "paris", "tokyo", "lima", "cairo", "rome", "oslo"),
    "color": ("red", "blue", "green", "black", "white", "gold"),
    "genre": ("rock", "jazz", "pop", "folk", "drama", "comedy"),
    "status": ("active", "closed", "new", "retired", "on hold"),
    "level": ("junior", "senior", "expert", "beginner"),
    "type": ("small", "large", "classic", "modern"),
    "language": ("english", "french", "hindi", "arabic", "thai"),
}
# Column -> (lowest, highest, step) of its values.
NUMBERS = {
    "age": (18, 70, 1),
    "year": (1980, 2020, 1),
    "price": (10, 300, 5),
    "rating": (1, 10, 1),
    "weight": (40, 120, 2),
    "score": (0, 100, 5),
    "budget": (100, 900, 50),
    "size": (5, 95, 5),
}
FIRST = ("anna", "ben", "carl", "dora", "eva", "finn", "gina", "hugo", "iris", "john", "kara", "leo", "mona", "nils")
LAST = ("adams", "baker", "clark", "davis", "evans", "ford", "gray", "hill", "jones", "king", "lane", "moore")
