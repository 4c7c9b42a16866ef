"""labels.csv: what is read, and every kind of bad row, named by file and line."""

import pytest
from PIL import Image

from datasets.labels import VOC_CLASSES, Sample, read_labels
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


def test_spreadsheet_habits(folder):
    """Byte-order mark, CRLF, quotes, blanks, empty lines, other columns, another order: all harmless."""
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
        ("b.jpg,cat;dog,1", "unknown class 'cat;dog'"),
        ("b.jpg,Cat,1", "unknown class 'Cat'"),
        ("b.jpg,cat,-1", "count '-1'"),
        ("b.jpg,cat,1.5", "count '1.5'"),
        ("b.jpg,cat,two", "count 'two'"),
        ("b.jpg,cat,", "no count"),
        ("b.jpg,cat", "no count"),
        ("b.jpg,cat,dog,2", "more fields"),
        ("z.jpg,cat,1", "z.jpg, which is missing"),
        ("../a.jpg,cat,1", "which is missing"),
        (",cat,1", "names no image"),
        ("a.jpg,cat,1", "names a again, after"),
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
def test_a_column_left_out_is_not_known(folder, text, expected):
    assert [(sample.classes, sample.count) for sample in read(folder, text)] == expected


def test_problems_can_be_collected(folder):
    (folder / "labels.csv").write_text(HEADER + "a.jpg,cat,1\nb.jpg,unicorn,1\nz.jpg,cat,1\nc.png,dog,x\na.jpg,cat,2\n")
    problems = []
    assert [sample.stem for sample in read_labels(folder, problems.append)] == ["a"]
    assert [str(problem).split("labels.csv ")[1].split(" ")[1] for problem in problems] == ["3", "4", "5", "6"]
    assert "line 6 names a again, after" in str(problems[3]) and str(problems[3]).endswith("line 2; keep one")


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
    with pytest.raises(InputError, match="names a again"):
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
    with pytest.raises(InputError, match=r"labels\.csv \(No such file"):
        read_labels(folder)


def test_no_folder(tmp_path):
    with pytest.raises(InputError, match="a data folder needs images/ and labels.csv"):
        read_labels(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00i\x00m", HEADER.encode() + b"a.jpg,caf\xe9,1\n"])
def test_not_utf8(folder, content):
    (folder / "labels.csv").write_bytes(content)
    with pytest.raises(InputError, match="not a UTF-8 text table"):
        read_labels(folder)
