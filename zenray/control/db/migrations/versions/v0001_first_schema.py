"""The first schema: ledger, organisations and keys, gateways and leases, deployments, what is published."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

APPEND_ONLY = ("ledger_entries", "usage_events")


def upgrade() -> None:
    _money()
    _people()
    _gateways()
    _deployments()
    _published()
    _forbid_changes()


def _money() -> None:
    op.create_table(
        "accounts",
        sa.Column("org", sa.String(), nullable=False),
        sa.Column("balance_nano_usd", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("org", name=op.f("pk_accounts")),
    )
    op.create_table(
        "ledger_entries",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("org", sa.String(), nullable=False),
        sa.Column("amount_nano_usd", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("source", sa.String(length=32), nullable=False),
        sa.Column("source_id", sa.String(), nullable=False),
        sa.Column("note", sa.Text(), nullable=True),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ledger_entries")),
        sa.UniqueConstraint("source", "source_id", "kind", name=op.f("uq_ledger_entries_source_source_id_kind")),
    )
    op.create_index(op.f("ix_ledger_entries_org"), "ledger_entries", ["org"], unique=False)
    op.create_table(
        "usage_events",
        sa.Column("billing_key", sa.String(), nullable=False),
        sa.Column("request_id", sa.String(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("org", sa.String(), nullable=False),
        sa.Column("user_id", sa.String(), nullable=True),
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("model_asked", sa.String(), nullable=False),
        sa.Column("model_answered", sa.String(), nullable=False),
        sa.Column("adapter", sa.String(), nullable=True),
        sa.Column("quantization", sa.String(), nullable=True),
        sa.Column("input_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cached_input_tokens", sa.BigInteger(), nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), nullable=False),
        sa.Column("price", sa.Text(), nullable=False),
        sa.Column("cost_nano_usd", sa.BigInteger(), nullable=False),
        sa.Column("latency_ms", sa.Double(), nullable=True),
        sa.Column("ttft_ms", sa.Double(), nullable=True),
        sa.Column("finish_reason", sa.String(), nullable=True),
        sa.Column("outcome", sa.String(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("day", sa.String(length=10), nullable=False),
        sa.PrimaryKeyConstraint("billing_key", name=op.f("pk_usage_events")),
    )
    op.create_index(op.f("ix_usage_events_at"), "usage_events", ["at"], unique=False)
    op.create_index(op.f("ix_usage_events_org_at"), "usage_events", ["org", "at"], unique=False)


def _people() -> None:
    op.create_table(
        "orgs",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("cache_salt", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_orgs")),
    )
    op.create_table(
        "api_keys",
        sa.Column("key_id", sa.String(length=40), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("shown", sa.String(length=64), nullable=False),
        sa.Column("org", sa.String(length=63), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=True),
        sa.Column("user_id", sa.String(length=200), nullable=True),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["org"], ["orgs.name"], name=op.f("fk_api_keys_org_orgs")),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("sha256", name=op.f("uq_api_keys_sha256")),
    )
    op.create_index(op.f("ix_api_keys_org"), "api_keys", ["org"], unique=False)


def _gateways() -> None:
    op.create_table(
        "gateways",
        sa.Column("gateway_id", sa.String(length=128), nullable=False),
        sa.Column("boot_id", sa.String(length=128), nullable=True),
        sa.Column("first_seen_at", sa.Double(), nullable=False),
        sa.Column("last_seen_at", sa.Double(), nullable=False),
        sa.Column("lost_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("gateway_id", name=op.f("pk_gateways")),
    )
    op.create_index(op.f("ix_gateways_last_seen_at"), "gateways", ["last_seen_at"], unique=False)
    op.create_table(
        "gateway_boots",
        sa.Column("gateway_id", sa.String(length=128), nullable=False),
        sa.Column("boot_id", sa.String(length=128), nullable=False),
        sa.Column("since", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("gateway_id", "boot_id", name=op.f("pk_gateway_boots")),
    )
    op.create_table(
        "lease_holds",
        sa.Column("gateway_id", sa.String(length=128), nullable=False),
        sa.Column("boot_id", sa.String(length=128), nullable=False),
        sa.Column("org", sa.String(length=63), nullable=False),
        sa.Column("held_nano_usd", sa.BigInteger(), nullable=False),
        sa.Column("last_sequence", sa.BigInteger(), nullable=True),
        sa.Column("last_granted_nano_usd", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("held_nano_usd >= 0", name=op.f("ck_lease_holds_not_negative")),
        sa.PrimaryKeyConstraint("gateway_id", "boot_id", "org", name=op.f("pk_lease_holds")),
    )
    op.create_index(op.f("ix_lease_holds_org"), "lease_holds", ["org"], unique=False)


def _deployments() -> None:
    op.create_table(
        "deployments",
        sa.Column("model", sa.String(length=63), nullable=False),
        sa.Column("wanted_revision", sa.String(length=200), nullable=False),
        sa.Column("stop", sa.Boolean(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("row_version", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("model", name=op.f("pk_deployments")),
    )
    op.create_table(
        "deployment_revisions",
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("model", sa.String(length=63), nullable=False),
        sa.Column("application", sa.Text(), nullable=False),
        sa.Column("phase", sa.String(length=16), nullable=False),
        sa.Column("since", sa.Double(), nullable=False),
        sa.Column("was_ready", sa.Boolean(), nullable=False),
        sa.Column("message", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["model"], ["deployments.model"], name=op.f("fk_deployment_revisions_model_deployments")
        ),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_deployment_revisions")),
    )
    op.create_index(op.f("ix_deployment_revisions_model"), "deployment_revisions", ["model"], unique=False)
    op.create_table(
        "deployment_events",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("model", sa.String(length=63), nullable=False),
        sa.Column("revision", sa.String(length=200), nullable=True),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("from_state", sa.String(length=16), nullable=True),
        sa.Column("to_state", sa.String(length=16), nullable=False),
        sa.Column("message", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deployment_events")),
    )
    op.create_index(op.f("ix_deployment_events_model_at"), "deployment_events", ["model", "at"], unique=False)


def _published() -> None:
    op.create_table(
        "published_entries",
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("payload", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("kind", "name", name=op.f("pk_published_entries")),
    )
    op.create_index(op.f("ix_published_entries_version"), "published_entries", ["version"], unique=False)
    op.create_table(
        "published_version",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("floor", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_published_version_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_published_version")),
    )
    op.execute("INSERT INTO published_version (id, version, floor) VALUES (1, 1, 1)")


def _forbid_changes() -> None:
    """What was booked stays as it was booked, whoever asks."""
    if op.get_bind().dialect.name == "sqlite":
        for table in APPEND_ONLY:
            for action in ("UPDATE", "DELETE"):
                op.execute(
                    f"CREATE TRIGGER {table}_no_{action.lower()} BEFORE {action} ON {table} "
                    f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
                )
        return
    op.execute(
        "CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME; END $$"
    )
    for table in APPEND_ONLY:
        op.execute(
            f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
        )
