"""labels.csv: the tables that are read, and a message with file and line for every kind of bad row."""

import pytest
from PIL import Image

from datasets.labels import VOC_CLASSES, Sample
from datasets.labels_csv import read_labels
from utils.cli import InputError

HEADER = "image,classes,count\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "b.jpg", "c.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name)
    return tmp_path


def read(folder, text):
    (folder / "labels.csv").write_text(text, encoding="utf-8")
    return read_labels(folder)


def test_classes_are_the_20_of_voc():
    assert len(set(VOC_CLASSES)) == 20 and list(VOC_CLASSES) == sorted(VOC_CLASSES)
    assert VOC_CLASSES.index("person") == 14


def test_rows_in_file_order(folder):
    samples = read(folder, HEADER + "b.jpg,person dog,3\na.jpg,cat,1\nc.png,,0\n")
    images = folder / "images"
    assert samples == [
        Sample(images / "b.jpg", (11, 14), 3),
        Sample(images / "a.jpg", (7,), 1),
        Sample(images / "c.png", (), 0),
    ]
    assert [sample.stem for sample in samples] == ["b", "a", "c"]


def test_tables_of_spreadsheets(folder):
    """Byte-order mark, CRLF, quotes, blanks, empty lines, other columns and another order are read."""
    text = '\ufeffcount, classes ,note,image\r\n 2 ,"dog  cat dog",x, a.jpg\r\n\r\n0,,,b.jpg\r\n'
    samples = read(folder, text)
    assert [(s.stem, s.classes, s.count) for s in samples] == [("a", (7, 11), 2), ("b", (), 0)]


def test_the_folder_may_be_a_string(folder):
    (folder / "labels.csv").write_text(HEADER + "a.jpg,cat,1\n")
    assert read_labels(str(folder))[0].path == folder / "images" / "a.jpg"


@pytest.mark.parametrize(
    "row, complaint",
    [
        ("b.jpg,unicorn,1", "unknown class 'unicorn'"),
        ("b.jpg,cat;elk,1", "unknown class 'elk'"),
        ("b.jpg,dining elk table,1", "unknown class 'dining'"),
        ("b.jpg,cat,-1", "count '-1'"),
        ("b.jpg,cat,1.5", "count '1.5'"),
        ('b.jpg,cat,"1,000"', "count '1,000'"),
        ("b.jpg,cat,251", "has the count 251; at most 250 objects"),
        (f"b.jpg,cat,{'9' * 5000}", "write an integer"),
        ("b.jpg,cat,two", "count 'two'"),
        ("b.jpg,cat,", "no count"),
        ("b.jpg,cat", "no count"),
        ("b.jpg,cat,dog,2", "more fields"),
        ("z.jpg,cat,1", "z.jpg, which is missing"),
        (f"{'z' * 300},cat,1", "which is missing"),
        ("./..,cat,1", "which is missing"),
        ("../z.jpg,cat,1", "which is missing"),
        ("c.jpg,cat,1", "c.jpg, which is missing (there is c.png)"),
        ('b.jpg,"cat', "is no row of a table"),
        (",cat,1", "names no image"),
        ("a.jpg,cat,1", "repeats the name a of"),
    ],
)
def test_bad_row(folder, row, complaint):
    with pytest.raises(InputError) as error:
        read(folder, f"{HEADER}a.jpg,cat,1\n{row}\n")
    text = str(error.value)
    assert f"{folder / 'labels.csv'} line 3" in text and complaint in text and "\n" not in text, text


@pytest.mark.parametrize(
    "text, expected",
    [
        ("image,classes\na.jpg,dog cat\nb.jpg,\n", [((7, 11), None), ((), None)]),
        ("count,image\n2,a.jpg\n0,b.jpg\n", [(None, 2), (None, 0)]),
    ],
)
def test_a_missing_column_means_unknown_labels(folder, text, expected):
    assert [(sample.classes, sample.count) for sample in read(folder, text)] == expected


def test_a_warning_about_an_unknown_column(folder, capsys):
    assert read(folder, ",image,kind,count\n0,a.jpg,cat,1\n")[0].classes is None
    assert "line 1 has no column classes, so that label is unknown (not read: kind)" in capsys.readouterr().err
    read(folder, "image,count,\na.jpg,1,\n")
    read(folder, "image,classes,count,note\na.jpg,cat,1,sharp\n")
    assert not capsys.readouterr().err


def test_problems_are_collected_by_report(folder):
    (folder / "labels.csv").write_text(HEADER + "a.jpg,cat,1\nb.jpg,unicorn,1\nz.jpg,cat,1\nc.png,dog,x\na.jpg,cat,2\n")
    problems = []
    assert [sample.stem for sample in read_labels(folder, problems.append)] == ["a"]
    assert [str(problem).split("labels.csv ")[1].split(" ")[1] for problem in problems] == ["3", "4", "5", "6"]
    assert "line 6 repeats the name a of" in str(problems[3]) and "line 2; rename or remove one" in str(problems[3])


def test_masks_beside_the_images(folder):
    (folder / "instance_masks").mkdir()
    Image.new("L", (4, 4), 3).save(folder / "instance_masks" / "a.png")
    a, b = read(folder, HEADER + "a.jpg,cat,1\nb.jpg,cat,1\n")
    assert (a.mask.read() == 3).all() and a.mask.size() == (4, 4) and b.mask is None


def test_line_number_counts_empty_lines(folder):
    with pytest.raises(InputError, match="line 4 has no count"):
        read(folder, HEADER + "\na.jpg,cat,1\nb.jpg,cat,\n")


def test_two_names_with_one_stem(folder):
    Image.new("RGB", (4, 4)).save(folder / "images" / "a.png")
    with pytest.raises(InputError, match="repeats the name a of"):
        read(folder, HEADER + "a.jpg,cat,1\na.png,cat,1\n")


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "lacks the column image and classes and count"),
        ("image,note\na.jpg,cat\n", "lacks the column classes and count"),
        ("classes,count\ncat,1\n", "lacks the column image"),
        ("a.jpg,cat,1\n", "its header must be image,classes,count"),
        (HEADER, "no rows"),
        (HEADER + "\n\n", "no rows"),
    ],
)
def test_bad_table(folder, text, complaint):
    with pytest.raises(InputError, match=complaint) as error:
        read(folder, text)
    assert str(folder / "labels.csv") in str(error.value)


def test_no_table(folder):
    with pytest.raises(InputError, match=r"there is no .*labels\.csv"):
        read_labels(folder)


def test_no_folder(tmp_path):
    with pytest.raises(InputError, match="a data folder needs images/ and labels.csv"):
        read_labels(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"PK\3\4\0\0", HEADER.encode() + b"a.jpg,\x81cat,1\n", b"\xff\xfei"])
def test_not_text(folder, content):
    (folder / "labels.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"labels.csv is not text"):
        read_labels(folder)


TABLE = "image,classes,count\na.jpg,person dog,2\nb.jpg,cat,1\n"


@pytest.mark.parametrize(
    "content",
    [
        TABLE.replace(",", ";").encode(),
        TABLE.replace(",", "\t").encode(),
        TABLE.replace(",", "|").encode(),
        TABLE.encode("utf-16"),
        TABLE.encode("utf-16-le"),
        TABLE.encode("utf-16-be"),
        TABLE.upper().encode(),
        TABLE.replace("\n", "\r").encode(),
        b"sep=;\r\n" + TABLE.replace(",", ";").encode(),
        b'\xef\xbb\xbf"sep=,"\r\n' + TABLE.encode(),
        b"\n\n" + TABLE.encode() + b",,\n;\n".replace(b";", b",,"),
        TABLE.replace("2\n", "2.0\n").replace("1\n", "1.00\n").encode(),
        b'image;classes;count\na.jpg;"dog,person";2,0\nb.jpg;cat;1,0\n',
        b"image,classes,count\na.jpg,\"['dog', 'person']\",2\nb.jpg,cat,1,,\n",
        b"Filename,Label,Counts\na.jpg,dog|person,2\nb.jpg,Cat/cat,1\n",
        b"label,image,classes,count\nx,images/a.jpg,dog person,2\ny,.\\images\\b.jpg,cat,1\n",
        b"image,classes,count\nA,dog;PERSON,2\nC:\\set\\B.JPG,cat,1\n",
    ],
)
def test_dialects(folder, content):
    """One table as written by Excel, LibreOffice, pandas and Windows."""
    (folder / "labels.csv").write_bytes(content)
    assert read_labels(folder) == [
        Sample(folder / "images" / "a.jpg", (11, 14), 2),
        Sample(folder / "images" / "b.jpg", (7,), 1),
    ]


def test_class_names_of_coco(folder):
    text = HEADER + 'a.jpg,"potted plant, dining-table, tv",3\nb.jpg,TV monitor airplane Couch motorcycle,4\n'
    assert [sample.classes for sample in read(folder, text)] == [(10, 15, 19), (0, 13, 17, 19)]


def test_file_names_outside_ascii(folder):
    """A table in cp1252, and accents composed in another way, as macOS does."""
    for name in ("\xe4.jpg", "e\u0301.jpg"):
        Image.new("RGB", (4, 4)).save(folder / "images" / name)
    (folder / "Labels.CSV").write_bytes((HEADER + "\xe4.jpg,cat,1\n\xe9.jpg,cat,1\n").encode("cp1252"))
    assert [sample.stem for sample in read_labels(folder)] == ["\xe4", "e\u0301"]


def test_ambiguous_file_names(folder):
    for name in ("A.JPG", "c.jpg"):
        Image.new("RGB", (4, 4)).save(folder / "images" / name)
    assert [sample.path.name for sample in read(folder, HEADER + "A.JPG,cat,1\n")] == ["A.JPG"]
    for name, files in (("a.Jpg", "A.JPG or a.jpg"), ("c", "c.jpg or c.png")):
        with pytest.raises(InputError, match=f"may be {files}"):
            read(folder, f"{HEADER}{name},cat,1\n")


def test_one_stem_in_several_folders(folder):
    """The stems include the folders, and then a missing folder is an error."""
    for name in ("cats/1.jpg", "dogs/1.jpg", "1.jpg", "dogs/2.jpg", "3.jpg"):
        (folder / "images" / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / "images" / name)
    text = HEADER + "cats/1.jpg,cat,1\ndogs/1.jpg,dog,1\n1.jpg,cow,1\ndogs\\2.jpg,dog,1\n"
    (folder / "instance_masks").mkdir()
    Image.new("L", (4, 4), 3).save(folder / "instance_masks" / "1.png")
    samples = read(folder, text)
    assert [sample.stem for sample in samples] == ["cats_1", "dogs_1", "1", "2"]
    assert [sample.mask is None for sample in samples] == [True, True, False, True]
    with pytest.raises(InputError, match="cows/3.jpg, which is missing"):
        read(folder, HEADER + "cows/3.jpg,cow,1\nelks/3.jpg,dog,1\n")


def test_photographs_beside_the_table(folder):
    (folder / "images" / "labels.csv").write_text(HEADER + "a.jpg,cat,1\n")
    assert read_labels(folder / "images")[0].path == folder / "images" / "a.jpg"


def test_only_the_requested_label_is_checked(folder):
    (folder / "labels.csv").write_text(HEADER + "a.jpg,unicorn,1\nb.jpg,cat,many\n")
    problems = []
    assert [sample.count for sample in read_labels(folder, problems.append, only="count")] == [1]
    assert [sample.classes for sample in read_labels(folder, problems.append, only="classes")] == [(7,)]
    assert ["many" in str(problem) for problem in problems] == [True, False]
    (folder / "labels.csv").write_text("image,count,kind\na.jpg,1,cat\n")
    assert read_labels(folder, only="count")[0].count == 1, "without a warning about the other column"
    with pytest.raises(InputError, match="line 1 lacks the column classes"):
        read_labels(folder, only="classes")


def test_a_repeated_column(folder):
    with pytest.raises(InputError, match="line 1 has the column count twice"):
        read(folder, "image,count,count\na.jpg,1,2\n")
