"Everything that describes the package is read from settings.ini; data/ and nbs/ travel in the wheel as diffcourse/_assets."
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here / 'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']


class BuildWithAssets(build_py):
    "Copy data/ and the notebooks beside the modules, in a wheel only: an editable install reads the checkout."
    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False): return
        assets = Path(self.build_lib) / 'diffcourse' / '_assets'
        shutil.rmtree(assets, ignore_errors=True)
        shutil.copytree(here / 'data', assets, ignore=shutil.ignore_patterns('__pycache__', '.*'))
        (assets / 'nbs').mkdir()
        for f in sorted((here / 'nbs').glob('*')):
            if f.suffix in ('.ipynb', '.bib', '.png'): shutil.copy2(f, assets / 'nbs' / f.name)


setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=(here / 'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Education', 'Intended Audience :: Science/Research',
                 *[f'Programming Language :: Python :: 3.{v}' for v in (11, 12, 13)]],
    packages=find_packages(include=['diffcourse', 'diffcourse.*']), python_requires=f">={cfg['min_python']},<3.14",
    install_requires=cfg['requirements'].split(),
    extras_require={'clip': cfg['clip_requirements'].split(), 'dev': cfg['dev_requirements'].split() + cfg['clip_requirements'].split()},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['diffcourse=diffcourse._modidx:d']},
    cmdclass={'build_py': BuildWithAssets}, zip_safe=False,
)
