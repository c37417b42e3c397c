"""Other process managers' files -> fleet.toml. Pure: text in, text out; `cli/importing.py` reads and writes the files.

draft        one fleet on its way: what was carried over from where, and what was not and why; and the fleet.toml made of it
commands     command lines, for a shell only where they need one
procfile     `web: bundle exec puma`: foreman, honcho, Heroku
supervisord  supervisord.conf
pm2          PM2's ecosystem file, `pm2 jlist`, dump.pm2
literal      JavaScript that is plain data, for pm2
"""
