import sys; sys.path.insert(0, "/tmp")
import io
import numpy as np, pytest
from PIL import Image
from build_shards import build
def enc(rng, ch, fmt):
    b=io.BytesIO(); a=rng.integers(0,256,(16,16,3) if ch==3 else (16,16),dtype=np.uint8)
    Image.fromarray(a).save(b, fmt, **({"quality":95} if fmt=="JPEG" else {})); return b.getvalue()
@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory):
    r=np.random.default_rng(0)
    return build(tmp_path_factory.mktemp("tiny")/"s",{"train":[(enc(r,3,"JPEG"),int(r.integers(2))) for i in range(100)],"val":[(enc(r,3,"JPEG"),i%2) for i in range(23)]},["cat","dog"],16,3,"jpg",12)
@pytest.fixture(scope="session")
def tiny_gray_shards(tmp_path_factory):
    r=np.random.default_rng(1)
    return build(tmp_path_factory.mktemp("gray")/"s",{"train":[(enc(r,1,"PNG"),i%2) for i in range(40)]},["cat","dog"],16,1,"png",12)
