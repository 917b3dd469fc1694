"Fill in the metadata that pyproject.toml marks `dynamic` from settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

cp = ConfigParser(delimiters=['='], interpolation=None)
cp.read(Path(__file__).with_name('settings.ini'), encoding='utf-8')
cfg = cp['DEFAULT']
status = 'Planning,Pre-Alpha,Alpha,Beta,Production/Stable,Mature,Inactive'.split(',')[int(cfg['status'])-1]
bench, ray, dev = (cfg[f'{o}_requirements'].split() for o in ('bench', 'ray', 'dev'))

setup(
    author=cfg['author'], author_email=cfg['author_email'],
    license_expression=cfg['license'], keywords=cfg['keywords'].split(),
    classifiers=[f"Development Status :: {cfg['status']} - {status}", f"Intended Audience :: {cfg['audience']}",
                 f"Natural Language :: {cfg['language']}", 'Programming Language :: Python :: 3'],
    install_requires=cfg['requirements'].split(), extras_require=dict(bench=bench, ray=bench+ray, dev=bench+ray+dev),
)
